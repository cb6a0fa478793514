#!/usr/bin/env bash
# Qwen2.5-7B, stage 1 (post-pretraining) after the paper's settings: new experts learn the expanded languages.
# Settings: recipes/qwen2.5-7b-stage1.yaml. Environment variables and flags that override them: train.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" qwen2.5-7b-stage1 "$@"
