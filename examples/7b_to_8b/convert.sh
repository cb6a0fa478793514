# shellcheck shell=bash
# Converts a dense model of 7B to 8B parameters to a Megatron checkpoint with experts.
# Sourced by convert_MODEL.sh with the model's name, which is all that differs between these models.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
model=$1
shift

: "${HF:=}"                               # directory with the model's config.json, safetensors and tokenizer
: "${SAVE:=checkpoints/$model-5experts}"  # the checkpoint to write
: "${NUM_EXPERTS:=5}"                     # with the original one. EP can then be 1, 2 or 4
: "${TOP_K:=2}"                           # experts per token

convert "$@"
