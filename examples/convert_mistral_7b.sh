#!/usr/bin/env bash
# Converts the dense Mistral-7B to a Megatron checkpoint with experts. Settings: 7b_to_8b/convert.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/7b_to_8b/convert.sh" mistral-7b "$@"
