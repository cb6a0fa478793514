#!/usr/bin/env bash
# Mistral-7B, stage 2 (review) after the paper's settings: routers learn to keep the original languages.
# Settings: recipes/mistral-7b-stage2.yaml. Environment variables and flags that override them: train.sh.
export TRAIN_ITERS="${TRAIN_ITERS:-epoch}" # each token of the review data once
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" mistral-7b-stage2 "$@"
