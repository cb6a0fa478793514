#!/usr/bin/env bash
# Mistral-7B, stage 1 (post-pretraining) after the paper's settings: new experts learn the expanded languages.
# Settings: recipes/mistral-7b-stage1.yaml. Environment variables and flags that override them: train.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" mistral-7b-stage1 "$@"
