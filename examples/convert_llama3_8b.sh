#!/usr/bin/env bash
# Converts the dense Llama-3-8B to a Megatron checkpoint with experts.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${HF:=}"                                # directory with the model's config.json, safetensors and tokenizer
: "${SAVE:=checkpoints/llama3-8b-5experts}"  # the checkpoint to write
: "${NUM_EXPERTS:=5}"                      # with the original one. EP can then be 1, 2 or 4
: "${TOP_K:=2}"                            # experts per token

convert "$@"
