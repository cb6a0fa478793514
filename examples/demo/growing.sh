#!/usr/bin/env bash
# Half of the demo's new experts, allocated by how alike the languages are in each layer, against all of them: the same
# tokens, fewer steps than the demo's, in one process. Ends in a table.

RUNS=${RUNS:-runs/demo-growing}
RANKS=${RANKS:-1}
STAGE1_ITERS=${STAGE1_ITERS:-140}
STAGE2_ITERS=${STAGE2_ITERS:-400}
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

SECONDS=0
for language in $EXPANDED; do tokens train train "$language" "$BASE"; done
for language in $ORIGINAL; do
    tokens replay train "$language" "$BASE" --max-documents "$REPLAY_DOCUMENTS"
    tokens sample train "$language" "$BASE" --max-documents 60
done
for language in $ORIGINAL $EXPANDED; do
    tokens valid valid "$language" "$BASE" --max-documents "$VALIDATION_DOCUMENTS"
done
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

"$PYTHON" tools/report.py --output "$RUNS/report.html" --evaluation "Base model=$RUNS/evaluation/base.json" \
    "6 new experts, stage 1=$RUNS/evaluation/half-stage1.json" \
    "6 new experts, stage 2=$RUNS/evaluation/half-stage2.json" \
    "12 new experts, stage 1=$RUNS/evaluation/full-stage1.json" \
    "12 new experts, stage 2=$RUNS/evaluation/full-stage2.json"
echo "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
