#!/usr/bin/env bash
# What the outcome depends on: 3, 5 or 9 experts; a replay of 0.03% to 3% of stage 1; a fourth new language (Czech, of
# GNOME's desktop help, which this fetches). Needs `make paper-table` and `make demo-full`, whose runs it goes on from, and
# adds its curves to runs/paper/report.html. Goes on where it was interrupted.

RUNS=${RUNS:-runs/paper}
FULL=${FULL:-runs/full}
SEED=${SEED:-1234}
RANKS=${RANKS:-1}
REPLAY_DOCUMENTS=${REPLAY_DOCUMENTS:-4}
# About 0.03%, 0.1%, 0.4%, 1% and 3% of stage 1 over the whole corpus; the documents are of very different lengths.
REPLAYS=${REPLAYS:-1 3 5 11 52}
TABLE=$RUNS
RUNS=$TABLE/scaling
DATA=$TABLE/data
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
source examples/demo/gnome.sh

SECONDS=0
if ! [ -e "$TABLE/report.html" ] || ! [ -e "$FULL/report.html" ]; then
    echo "error: run \`make paper-table\` and \`make demo-full\` first: $TABLE and $FULL are not complete" >&2
    exit 1
fi

# both NAME EXPERTS: the two stages with so many experts a layer, and the evaluation.
both() {
    step "$RUNS/$1/latest_checkpointed_iteration.txt" "$1: a mixture of $2 experts" "$PYTHON" tools/convert_hf.py import \
        --hf "$BASE" --save "$RUNS/$1" --num-experts "$2" --moe-layer-freq "$MOE_LAYERS" --seed "$SEED"
    step "$RUNS/$1-stage1/.done" "$1: stage 1" learn_expanded 1 "$RUNS/$1" "$RUNS/$1-stage1"
    step "$RUNS/$1-stage2/.done" "$1: stage 2" review "$RUNS/$1-stage1" "$RUNS/$1-stage2"
}

# After stage 1 over the whole corpus, with so many documents of each original language.
replays() {
    local documents language REPLAY
    for documents in $REPLAYS; do
        REPLAY=replay-$documents
        for language in $ORIGINAL; do tokens "$REPLAY" train "$language" "$BASE" --max-documents "$documents"; done
        step "$RUNS/$REPLAY/.done" "a review with $documents documents of each original language" \
            review "$FULL/stage1" "$RUNS/$REPLAY"
        evaluate "$REPLAY" "$RUNS/$REPLAY"
    done
}

# A third more tokens in both stages: each language has as many as before. The first 40 pages are for validation.
czech() {
    local split EXPANDED="$EXPANDED"
    gnome_text "$RUNS/gnome" cs en
    head -n 40 "$RUNS/gnome/text/cs.jsonl" >"$RUNS/gnome/valid-cs.jsonl"
    tail -n +41 "$RUNS/gnome/text/cs.jsonl" >"$RUNS/gnome/train-cs.jsonl"
    for split in train valid; do
        step "$DATA/$split-cs.json" "tokens of $split cs" "$PYTHON" tools/preprocess_data.py \
            --input "$RUNS/gnome/$split-cs.jsonl" --language cs --tokenizer "$BASE" --output-prefix "$DATA/$split-cs"
    done
    EXPANDED="$EXPANDED cs" STAGE1_ITERS=$((STAGE1_ITERS * 4 / 3)) STAGE2_ITERS=$((STAGE2_ITERS * 4 / 3)) both cs $EXPERTS
    evaluate cs "$RUNS/cs-stage2"
}

experts() {
    local count
    for count in 3 9; do
        both experts-$count $count
        evaluate experts-$count "$RUNS/experts-$count-stage2"
    done
}

replays_and_czech() {
    replays
    czech
}

beside "experts" experts
beside "replay and cs" replays_and_czech
await
ORIGINAL="en" EXPANDED="cs" evaluate on-cs-base "$TABLE/base"
ORIGINAL="en" EXPANDED="cs" evaluate on-cs-without "$TABLE/seed-$SEED/stage2"
ORIGINAL="en" EXPANDED="cs" evaluate on-cs-with "$RUNS/cs-stage2"
echo "Czech, before and after it was learned:"
"$PYTHON" tools/report.py --output "$RUNS/cs.html" --evaluation "Base model=$RUNS/evaluation/on-cs-base.json" \
    "el, hu, tr learned=$RUNS/evaluation/on-cs-without.json" "el, hu, tr, cs learned=$RUNS/evaluation/on-cs-with.json"

# shellcheck disable=SC2086  # a list of numbers
"$PYTHON" examples/demo/curves.py --table "$TABLE" --full "$FULL" --seed "$SEED" --replays $REPLAYS \
    --output "$RUNS/curves.json"
RUNS=$TABLE bash examples/demo/paper_table.sh
echo "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
