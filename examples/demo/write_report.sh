#!/usr/bin/env bash
# Writes $RUNS/report.html from all evaluations in $RUNS, and prints the table.

source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

evaluations=("Base model=$RUNS/evaluation/base.json")
add() { if [ -e "$RUNS/evaluation/$2.json" ]; then evaluations+=("$1=$RUNS/evaluation/$2.json"); fi; }
add "Stage 1: post-pretraining" stage1
add "Stage 2: review (MoE-LPR)" stage2
add "Full fine-tuning of the dense model" dense_full
add "Upcycling, nothing frozen" moe_full
add "Review without LPR" no_lpr

"$PYTHON" tools/report.py --evaluation "${evaluations[@]}" \
    --metrics "Stage 1=$RUNS/stage1/metrics.jsonl" "Stage 2=$RUNS/stage2/metrics.jsonl" \
    --samples "$RUNS/samples.json" --output "$RUNS/report.html"
echo "report: $RUNS/report.html"
