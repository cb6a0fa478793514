# shellcheck shell=bash
# Stage 2 of a model of 7B to 8B parameters, on one node of 8 GPUs of 80 GB. For other machines, tools/plan.py lists
# the layouts. Sourced by stage2_MODEL.sh with the model's name, which is all that differs between these models.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
model=$1
shift

: "${LOAD:=runs/$model-5experts-stage1}"  # SAVE of stage1_MODEL.sh
: "${SAVE:=runs/$model-5experts-stage2}"  # checkpoints and logs; started again, the run resumes from here
: "${DATA:=datasets/$model}"              # what preprocess.sh wrote with this model's tokenizer
: "${EXPANDED:=el hu tr}"                 # languages that stage 1 taught
: "${ORIGINAL:=en es zh}"                 # languages that the dense model knows, replayed with the LPR loss
: "${TRAIN_ITERS:=}"                      # default: each token of the review data once
: "${SEQ_LENGTH:=512}"                    # tokens of a sequence
: "${GLOBAL_BATCH:=512}"                  # sequences of a step
: "${MICRO_BATCH:=1}"                     # sequences a rank computes at once; lower it when memory runs out
: "${LR:=5e-5}"                           # highest learning rate, cosine decay
: "${SAVE_INTERVAL:=200}"                 # steps between checkpoints
: "${TP:=1}" "${PP:=2}" "${EP:=4}"        # tensor, pipeline and expert parallel sizes
: "${RECOMPUTE:=none}"                    # activation recomputation: none, moe or full

train_stage2 "$@"
