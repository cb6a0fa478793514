#!/usr/bin/env bash
# Converts the dense Qwen1.5-1.8B to a Megatron checkpoint with experts.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${HF:=}"                                     # directory with the model's config.json, safetensors and tokenizer
: "${SAVE:=checkpoints/qwen1.5-1.8b-6experts}"  # the checkpoint to write
: "${NUM_EXPERTS:=6}"                           # with the original one; the paper's number. EP can then be 1 or 5
: "${TOP_K:=2}"                                 # experts per token

convert "$@"
