#!/usr/bin/env bash
# Qwen2.5-7B: the dense Hugging Face model becomes a Megatron checkpoint with experts.
# 7b_to_8b/convert.sh has the settings.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/7b_to_8b/convert.sh" qwen2.5-7b "$@"
