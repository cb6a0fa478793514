#!/usr/bin/env bash
# Qwen1.5-1.8B, stage 2 (review) with the paper's settings: routers learn to keep the original languages.
# Settings: recipes/qwen1.5-1.8b-stage2.yaml. Environment variables and flags that override them: train.sh.
export TRAIN_ITERS="${TRAIN_ITERS:-epoch}" # each token of the review data once
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" qwen1.5-1.8b-stage2 "$@"
