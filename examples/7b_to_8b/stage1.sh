# shellcheck shell=bash
# Stage 1 of a model of 7B to 8B parameters, on one node of 8 GPUs of 80 GB. For other machines, tools/plan.py lists
# the layouts. Sourced by stage1_MODEL.sh with the model's name, which is all that differs between these models.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
model=$1
shift

: "${LOAD:=checkpoints/$model-5experts}"  # what convert_MODEL.sh wrote
: "${SAVE:=runs/$model-5experts-stage1}"  # checkpoints and logs; started again, the run resumes from here
: "${DATA:=datasets/$model}"              # what preprocess.sh wrote with this model's tokenizer
: "${EXPANDED:=el hu tr}"                 # languages to learn, in equal shares
: "${ORIGINAL:=en es zh}"                 # languages that the dense model knows: validation only
: "${TRAIN_ITERS:=45776}"                 # 24B tokens, 8B of each language
: "${SEQ_LENGTH:=1024}"                   # tokens of a sequence
: "${GLOBAL_BATCH:=512}"                  # sequences of a step
: "${MICRO_BATCH:=1}"                     # sequences a rank computes at once; lower it when memory runs out
: "${LR:=5e-5}"                           # highest learning rate, cosine decay
: "${SAVE_INTERVAL:=1000}"                # steps between checkpoints
: "${TP:=1}" "${PP:=2}" "${EP:=4}"        # tensor, pipeline and expert parallel sizes
: "${RECOMPUTE:=none}"                    # activation recomputation: none, moe or full

train_stage1 "$@"
