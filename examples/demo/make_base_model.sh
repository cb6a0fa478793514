#!/usr/bin/env bash
# Makes data/base_model, the demo's small dense model, anew: a tokenizer over the demo corpus, random weights, then
# `--stage full` on English, Spanish and Chinese with 1% each of Greek, Hungarian and Turkish, since a real model has
# seen some of every language. Writes $RUNS/hf. docs/demo.md says how long it takes, docs/experiments.md what was tried.

RUNS=${RUNS:-runs/base_model}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ITERS=${ITERS:-2000}

make() {
    # shellcheck disable=SC2046,SC2086  # lists of words
    ranks -m megatron_moe_lpr.pretrain --stage full --load "$RUNS/random" --save "$RUNS/trained" $PRECISION \
        --train-iters "$ITERS" --micro-batch-size $((8 / RANKS)) --global-batch-size 8 --seq-length 256 \
        --lr 2e-3 --min-lr 1e-4 --lr-warmup-iters 100 --weight-decay 0.1 --adam-beta2 0.95 \
        --data-path 38.8 "$RUNS/data/train-en" 34.92 "$RUNS/data/train-es" 23.28 "$RUNS/data/train-zh" \
        1 "$RUNS/data/train-el" 1 "$RUNS/data/train-hu" 1 "$RUNS/data/train-tr" \
        --valid-data-path $(datasets valid $ORIGINAL $EXPANDED) --original-languages $ORIGINAL \
        --num-workers 0 --log-interval 50 --save-interval 500
}

step "$RUNS/random_hf/config.json" "tokenizer and random weights" \
    "$PYTHON" examples/demo/random_model.py --input "$CORPUS/train/*.jsonl.zst" --hf "$RUNS/random_hf"
for language in $ORIGINAL $EXPANDED; do
    tokens train train "$language" "$RUNS/random_hf"
    tokens valid valid "$language" "$RUNS/random_hf"
done
step "$RUNS/random/latest_checkpointed_iteration.txt" "to Megatron" \
    "$PYTHON" tools/convert_hf.py import --hf "$RUNS/random_hf" --save "$RUNS/random" --num-experts 1
step "$RUNS/trained/.done" "training" make
step "$RUNS/hf/config.json" "to Hugging Face" "$PYTHON" tools/convert_hf.py export --load "$RUNS/trained" --hf "$RUNS/hf"
cp "$RUNS/trained/metrics.jsonl" "$RUNS/hf/metrics.jsonl"
echo "the base model is in $RUNS/hf; cp -r it to data/base_model to use it in the demo"
