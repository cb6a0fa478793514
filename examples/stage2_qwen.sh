#!/usr/bin/env bash
# Qwen1.5-1.8B, stage 2 (review) with the paper's settings: routers learn to keep the original languages.
# For one node of 8 GPUs of 80 GB; with more nodes each GPU gets fewer sequences of the batch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${LOAD:=runs/qwen1.5-1.8b-6experts-stage1}"  # SAVE of stage1_qwen.sh
: "${SAVE:=runs/qwen1.5-1.8b-6experts-stage2}"  # checkpoints and logs; started again, the run resumes from here
: "${DATA:=datasets/qwen1.5-1.8b}"              # what preprocess.sh wrote with this model's tokenizer
: "${EXPANDED:=el hu tr}"                       # languages that stage 1 taught
: "${ORIGINAL:=en es zh}"                       # languages that the dense model knows, replayed with the LPR loss
: "${TRAIN_ITERS:=}"                            # default: each token of the review data once
: "${SEQ_LENGTH:=512}"                          # tokens of a sequence
: "${GLOBAL_BATCH:=512}"                        # sequences of a step
: "${MICRO_BATCH:=8}"                           # sequences a rank computes at once; lower it when memory runs out
: "${LR:=5e-5}"                                 # highest learning rate, cosine decay
: "${SAVE_INTERVAL:=200}"                       # steps between checkpoints
: "${TP:=1}" "${PP:=1}" "${EP:=1}"              # tensor, pipeline and expert parallel sizes
: "${RECOMPUTE:=none}"                          # activation recomputation: none, moe or full

train_stage2 "$@"
