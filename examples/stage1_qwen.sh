#!/usr/bin/env bash
# Qwen1.5-1.8B, stage 1 (post-pretraining) with the paper's settings: new experts learn the expanded languages.
# Settings: recipes/qwen1.5-1.8b-stage1.yaml. Environment variables and flags that override them: train.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" qwen1.5-1.8b-stage1 "$@"
