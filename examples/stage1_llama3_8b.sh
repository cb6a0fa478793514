#!/usr/bin/env bash
# Llama-3-8B, stage 1 (post-pretraining) after the paper's settings: new experts learn the expanded languages.
# Settings: recipes/llama3-8b-stage1.yaml. Environment variables and flags that override them: train.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" llama3-8b-stage1 "$@"
