#!/usr/bin/env bash
# Converts the dense Llama-3-8B to a Megatron checkpoint with experts. Settings: 7b_to_8b/convert.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/7b_to_8b/convert.sh" llama3-8b "$@"
