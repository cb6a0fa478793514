#!/usr/bin/env bash
# Runs lm_eval on the base model and on the demo's exported one: which of four endings continues a held-out passage?
# Needs the package's extra `eval`. Runs the demo first if it is not there.

source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

SECONDS=0
[ -e "$RUNS/hf/config.json" ] || bash examples/demo/run.sh
# shellcheck disable=SC2086  # a list of words
step "$RUNS/choices/.done" "a multiple-choice task for each language" "$PYTHON" examples/demo/make_choices.py \
    --corpus "$CORPUS/valid" --languages $ORIGINAL $EXPANDED --output "$RUNS/choices"
if [ "$PRECISION" = --bf16 ]; then DTYPE=bfloat16; else DTYPE=float32; fi
# shellcheck disable=SC2086  # a list of words
tasks=$(printf "continuation_%s," $ORIGINAL $EXPANDED)

# choose NAME MODEL: lm_eval's results in $RUNS/choices/NAME.
choose() {
    step "$RUNS/choices/$1/.done" "lm_eval of $2" env OMP_NUM_THREADS="$CORES" HF_DATASETS_OFFLINE=1 \
        "$PYTHON" -m lm_eval --model hf --model_args "pretrained=$2,dtype=$DTYPE" --device cpu --batch_size 16 \
        --include_path "$RUNS/choices" --tasks "${tasks%,}" --output_path "$RUNS/choices/$1"
}
choose base "$BASE"
choose final "$RUNS/hf"
# shellcheck disable=SC2086  # a list of words
"$PYTHON" examples/demo/compare_choices.py --languages $ORIGINAL $EXPANDED \
    --results "base model=$RUNS/choices/base" "after stage 2=$RUNS/choices/final"
echo "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
