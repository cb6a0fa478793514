#!/usr/bin/env bash
# Fewer experts, and languages added later, with fewer steps than the demo's, in one process. Ends in two tables: half
# of the demo's new experts, allocated by layer, against all of them; and el and hu first, tr by a second expansion,
# against all three at once. Both sides of a table see the same tokens in stage 1. Described in docs/growing.md.

RUNS=${RUNS:-runs/demo-growing}
RANKS=${RANKS:-1}
STAGE1_ITERS=${STAGE1_ITERS:-140}
STAGE2_ITERS=${STAGE2_ITERS:-400}
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

SECONDS=0
demo_tokens
for language in $ORIGINAL; do tokens sample train "$language" "$BASE" --max-documents 60; done
step "$RUNS/base/latest_checkpointed_iteration.txt" "dense model to Megatron" \
    "$PYTHON" tools/convert_hf.py import --hf "$BASE" --save "$RUNS/base" --num-experts 1

# shellcheck disable=SC2046,SC2086  # lists of words
step "$RUNS/allocation.json" "how many experts each layer gets" \
    "$PYTHON" tools/allocate_experts.py --load "$BASE" --original-languages $ORIGINAL --budget 6 --dense-layers 0 \
    --data-path $(datasets train $EXPANDED) $(datasets sample $ORIGINAL) \
    --output "$RUNS/allocation.json" --plot "$RUNS/allocation.svg"

# both NAME EXPERTS: the two stages of a model with these experts, evaluated.
both() {
    step "$RUNS/$1/latest_checkpointed_iteration.txt" "$1: a mixture of experts" \
        "$PYTHON" tools/convert_hf.py import --hf "$BASE" --save "$RUNS/$1" --experts-per-layer "$2"
    step "$RUNS/$1-stage1/.done" "$1: stage 1" learn_expanded 1 "$RUNS/$1" "$RUNS/$1-stage1"
    step "$RUNS/$1-stage2/.done" "$1: stage 2" review "$RUNS/$1-stage1" "$RUNS/$1-stage2"
    evaluate "$1-stage1" "$RUNS/$1-stage1"
    evaluate "$1-stage2" "$RUNS/$1-stage2"
}
both half "$RUNS/allocation.json"
both full 1,5,5,5
evaluate base "$RUNS/base"

# Two thirds of the tokens and of the experts for el and hu, then a third for tr; a review after each.
FIRST_ITERS=$((STAGE1_ITERS * 2 / 3))
step "$RUNS/first/latest_checkpointed_iteration.txt" "el and hu first: a mixture of experts" \
    "$PYTHON" tools/convert_hf.py import --hf "$BASE" --save "$RUNS/first" --experts-per-layer 1,3,3,3
EXPANDED="el hu" STAGE1_ITERS=$FIRST_ITERS \
    step "$RUNS/first-stage1/.done" "el and hu: stage 1" learn_expanded 1 "$RUNS/first" "$RUNS/first-stage1"
EXPANDED="el hu" step "$RUNS/first-stage2/.done" "el and hu: stage 2" review "$RUNS/first-stage1" "$RUNS/first-stage2"
step "$RUNS/second/latest_checkpointed_iteration.txt" "tr afterwards: two more experts in each layer" \
    "$PYTHON" tools/convert_hf.py expand --load "$RUNS/first-stage2" --save "$RUNS/second" --add-experts 0,2,2,2
EXPANDED="tr" STAGE1_ITERS=$((STAGE1_ITERS - FIRST_ITERS)) \
    step "$RUNS/second-stage1/.done" "tr: stage 1" learn_expanded 1 "$RUNS/second" "$RUNS/second-stage1"
step "$RUNS/second-stage2/.done" "tr: stage 2" review "$RUNS/second-stage1" "$RUNS/second-stage2"
for name in first-stage2 second-stage1 second-stage2; do evaluate "$name" "$RUNS/$name"; done

echo "half of the new experts against all of them:"
"$PYTHON" tools/report.py --output "$RUNS/report.html" --evaluation "Base model=$RUNS/evaluation/base.json" \
    "6 new experts, stage 1=$RUNS/evaluation/half-stage1.json" \
    "6 new experts, stage 2=$RUNS/evaluation/half-stage2.json" \
    "12 new experts, stage 1=$RUNS/evaluation/full-stage1.json" \
    "12 new experts, stage 2=$RUNS/evaluation/full-stage2.json"
echo "el and hu first, tr afterwards, against all three at once:"
"$PYTHON" tools/report.py --output "$RUNS/later.html" --evaluation "Base model=$RUNS/evaluation/base.json" \
    "all at once, stage 2=$RUNS/evaluation/full-stage2.json" \
    "el and hu first, stage 2=$RUNS/evaluation/first-stage2.json" \
    "tr afterwards, stage 1=$RUNS/evaluation/second-stage1.json" \
    "tr afterwards, stage 2=$RUNS/evaluation/second-stage2.json"
echo "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
