#!/usr/bin/env bash
# Qwen1.5-1.8B, stage 1 (post-pretraining) with the paper's settings: new experts learn the expanded languages.
# For one node of 8 GPUs of 80 GB; with more nodes each GPU gets fewer sequences of the batch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${LOAD:=checkpoints/qwen1.5-1.8b-6experts}"  # what convert_qwen.sh wrote
: "${SAVE:=runs/qwen1.5-1.8b-6experts-stage1}"  # checkpoints and logs; started again, the run resumes from here
: "${DATA:=datasets/qwen1.5-1.8b}"              # what preprocess.sh wrote with this model's tokenizer
: "${EXPANDED:=el hu tr}"                       # languages to learn, in equal shares
: "${ORIGINAL:=en es zh}"                       # languages that the dense model knows: validation only
: "${TRAIN_ITERS:=45776}"                       # 24B tokens, 8B of each language
: "${SEQ_LENGTH:=1024}"                         # tokens of a sequence
: "${GLOBAL_BATCH:=512}"                        # sequences of a step
: "${MICRO_BATCH:=8}"                           # sequences a rank computes at once; lower it when memory runs out
: "${LR:=5e-5}"                                 # highest learning rate, cosine decay
: "${SAVE_INTERVAL:=1000}"                      # steps between checkpoints
: "${TP:=1}" "${PP:=1}" "${EP:=1}"              # tensor, pipeline and expert parallel sizes
: "${RECOMPUTE:=none}"                          # activation recomputation: none, moe or full

train_stage1 "$@"
