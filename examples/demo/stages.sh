# shellcheck shell=bash disable=SC2034  # sourced by scripts that use what is set here
# Settings and stages of the demo, shared by its scripts so that all of them see the same tokens. docs/experiments.md
# says what was tried. A step takes BATCH x LENGTH tokens.

RUNS=${RUNS:-runs/demo}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

BASE=${BASE:-data/base_model}
EXPERTS=5
# Layer 0 stays dense: its router cannot tell the languages apart.
MOE_LAYERS=${MOE_LAYERS:-[0]+[1]*3}
LENGTH=256
SEED=${SEED:-1234}
STAGE1_ITERS=${STAGE1_ITERS:-280}
STAGE1_BATCH=8
STAGE1_LR=${STAGE1_LR:-3e-3}
STAGE2_ITERS=${STAGE2_ITERS:-1200}
STAGE2_BATCH=2
STAGE2_LR=${STAGE2_LR:-5e-3}
REPLAY=${REPLAY:-replay}
REPLAY_DOCUMENTS=${REPLAY_DOCUMENTS:-10}
VALIDATION_DOCUMENTS=${VALIDATION_DOCUMENTS:-40}
EXPERT_PARALLEL="--expert-model-parallel-size $RANKS"

# demo_tokens: training text of the expanded languages, the replay, and validation text.
demo_tokens() {
    local language
    for language in $EXPANDED; do tokens train train "$language" "$BASE"; done
    for language in $ORIGINAL; do
        tokens "$REPLAY" train "$language" "$BASE" --max-documents "$REPLAY_DOCUMENTS"
    done
    for language in $ORIGINAL $EXPANDED; do
        tokens valid valid "$language" "$BASE" --max-documents "$VALIDATION_DOCUMENTS"
    done
}

# train STAGE BATCH LOAD SAVE ARGUMENTS...: goes on where an earlier start was interrupted.
train() {
    local stage=$1 batch=$2 load=$3 save=$4
    shift 4
    # shellcheck disable=SC2086  # lists of words
    ranks -m megatron_moe_lpr.pretrain --stage "$stage" --load "$load" --save "$save" $PRECISION \
        --micro-batch-size $((batch / RANKS)) --global-batch-size "$batch" --seq-length $LENGTH \
        --original-languages $ORIGINAL --num-workers 0 --log-interval 20 --save-interval 200 \
        --seed "$SEED" "$@"
}

# learn_expanded STAGE LOAD SAVE ARGUMENTS...: el, hu and tr, as stage 1 does.
learn_expanded() {
    local stage=$1
    shift
    # shellcheck disable=SC2046,SC2086
    train "$stage" $STAGE1_BATCH "$@" --train-iters "$STAGE1_ITERS" --lr "$STAGE1_LR" \
        --lr-warmup-iters $((STAGE1_ITERS / 20)) --data-path $(datasets train $EXPANDED)
}

# review LOAD SAVE ARGUMENTS...: a third replay of a few documents of en, es and zh, two thirds el, hu and tr. The
# replay are the datasets $REPLAY-LANGUAGE.
review() {
    local load=$1 save=$2 language blend=()
    shift 2
    for language in $ORIGINAL; do blend+=(1 "$DATA/$REPLAY-$language"); done
    for language in $EXPANDED; do blend+=(2 "$DATA/train-$language"); done
    train 2 $STAGE2_BATCH "$load" "$save" --train-iters "$STAGE2_ITERS" --lr "$STAGE2_LR" \
        --data-path "${blend[@]}" "$@"
}

# evaluate NAME CHECKPOINT ARGUMENTS...: the six validation sets, to $RUNS/evaluation/NAME.json.
evaluate() {
    local name=$1 checkpoint=$2
    shift 2
    mkdir -p "$RUNS/evaluation"
    # shellcheck disable=SC2046,SC2086
    step "$RUNS/evaluation/$name.json" "evaluation of $name" ranks tools/evaluate.py --load "$checkpoint" \
        --valid-data-path $(datasets valid $ORIGINAL $EXPANDED) --original-languages $ORIGINAL \
        --seq-length $LENGTH --micro-batch-size 8 $PRECISION --output "$RUNS/evaluation/$name.json" "$@"
}
