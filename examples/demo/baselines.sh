#!/usr/bin/env bash
# Trains the demo's baselines on the same tokens and adds them to its table: full fine-tuning of the dense model,
# upcycling with nothing frozen, and a review without LPR. (The MoE without review is the demo's own stage 1.) Runs the
# demo first if it is not there.

source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

SECONDS=0
[ -e "$RUNS/stage2/.done" ] || bash examples/demo/run.sh
step "$RUNS/dense_full/.done" "full fine-tuning of the dense model" \
    learn_expanded full "$RUNS/base" "$RUNS/dense_full"
# shellcheck disable=SC2086  # a list of words
{
step "$RUNS/moe_full/.done" "upcycling with nothing frozen" \
    learn_expanded full "$RUNS/moe" "$RUNS/moe_full" $EXPERT_PARALLEL
step "$RUNS/no_lpr/.done" "review without LPR" \
    review "$RUNS/stage1" "$RUNS/no_lpr" --lpr-loss-coeff 0 $EXPERT_PARALLEL
evaluate dense_full "$RUNS/dense_full"
evaluate moe_full "$RUNS/moe_full" $EXPERT_PARALLEL
evaluate no_lpr "$RUNS/no_lpr" $EXPERT_PARALLEL
}
bash examples/demo/write_report.sh
echo "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
