#!/usr/bin/env bash
# Qwen2.5-7B, stage 2 (review) after the paper's settings: routers learn to keep the original languages.
# For one node of 8 GPUs of 80 GB. Settings: 7b_to_8b/stage2.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/7b_to_8b/stage2.sh" qwen2.5-7b "$@"
