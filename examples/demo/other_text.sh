#!/usr/bin/env bash
# Evaluates the demo's models on another text: GNOME's desktop help, from Debian's or Ubuntu's package gnome-user-docs,
# which this script fetches. It has hardly any Turkish. Needs apt-get and dpkg. Runs the demo first if it is not there.

source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
source examples/demo/gnome.sh

OTHER=$RUNS/other_text
EXPANDED="el hu"
[ -e "$RUNS/hf/config.json" ] || bash examples/demo/run.sh
# shellcheck disable=SC2086  # a list of words
gnome_text "$OTHER" $ORIGINAL $EXPANDED
for language in $ORIGINAL $EXPANDED; do
    step "$OTHER/data/valid-$language.json" "tokens of $language" "$PYTHON" tools/preprocess_data.py \
        --input "$OTHER/text/$language.jsonl" --language "$language" --tokenizer "$BASE" \
        --output-prefix "$OTHER/data/valid-$language" --max-documents "$VALIDATION_DOCUMENTS"
done
demo=$RUNS RUNS=$OTHER DATA=$OTHER/data
# shellcheck disable=SC2086  # a list of words
{
evaluate base "$demo/base"
evaluate stage1 "$demo/stage1" $EXPERT_PARALLEL
evaluate stage2 "$demo/stage2" $EXPERT_PARALLEL
}
"$PYTHON" tools/report.py --output "$OTHER/report.html" --evaluation "Base model=$OTHER/evaluation/base.json" \
    "Stage 1: post-pretraining=$OTHER/evaluation/stage1.json" "Stage 2: review (MoE-LPR)=$OTHER/evaluation/stage2.json"
