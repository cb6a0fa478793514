#!/usr/bin/env bash
# Trains a stage on this node by a recipe, which holds the settings and their reasons. First shows the command, the
# layout and the memory estimate, and stops where something does not fit.
#   bash examples/train.sh RECIPE [FLAG...]     RECIPE: a file, or a name in recipes/ such as llama3-8b-stage1
# These environment variables override the recipe, and flags (of `moe-lpr train`) override both:
#   LOAD, SAVE                          checkpoint to start from; directory of checkpoints and logs
#   DATA, EXPANDED, ORIGINAL            directory of preprocess.sh; new languages; languages that the dense model knows
#   TRAIN_ITERS                         steps; epoch: as many as draw each token of the training data once
#   SEQ_LENGTH, GLOBAL_BATCH, MICRO_BATCH, LR, SAVE_INTERVAL, LOG_INTERVAL
#   TP, PP, EP                          tensor, pipeline and expert parallel sizes
#   RECOMPUTE                           activation recomputation: none, moe or full
#   FP8=1, FP8_RECIPE                   matrix products in FP8, scaled by the recipe delayed (default) or blockwise
# PLATFORM, GPUS_PER_NODE, NUM_NODES, MIN_NODES, GPU_MEMORY, DRY_RUN, LOG_DIR and PYTHON: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec "$PYTHON" "$ROOT/examples/train.py" "$@"
