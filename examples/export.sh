#!/usr/bin/env bash
# Exports the trained checkpoint to a stock Hugging Face directory, which transformers, vLLM and lm_eval load.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${LOAD:=runs/qwen1.5-1.8b-6experts-stage2}"  # SAVE of stage2_*.sh
: "${HF_OUT:=exported/qwen1.5-1.8b-moe-lpr}"    # directory to write

need_file LOAD "$LOAD" "it is SAVE of stage2_*.sh"
run "$PYTHON" "$ROOT/tools/convert_hf.py" export --load "$LOAD" --hf "$HF_OUT" "$@"
