#!/usr/bin/env bash
# Mistral-7B, stage 2 (review) after the paper's settings: routers learn which languages are the original expert's.
# For one node of 8 GPUs of 80 GB; 7b_to_8b/stage2.sh has the settings.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/7b_to_8b/stage2.sh" mistral-7b "$@"
