#!/usr/bin/env bash
# Mistral-7B, stage 1 (post-pretraining) after the paper's settings: new experts learn the expanded languages.
# For one node of 8 GPUs of 80 GB. Settings: 7b_to_8b/stage1.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/7b_to_8b/stage1.sh" mistral-7b "$@"
