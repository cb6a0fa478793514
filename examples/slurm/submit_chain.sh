#!/usr/bin/env bash
# Submits stage 1, stage 2 and export; each starts when the one before has succeeded. From the root of the repository:
#   bash examples/slurm/submit_chain.sh qwen --nodes=4 --gpus-per-node=8
# The first argument picks the scripts (stage1_NAME.sh) or the recipes (recipes/NAME-stage1.yaml); the others go to
# sbatch for the two training jobs. Settings in the environment reach all jobs; those below differ between them.
set -euo pipefail
name=${1:?usage: submit_chain.sh NAME [SBATCH OPTION...]}
shift
: "${RUN:=runs/$name}"                # holds both stages
: "${CHECKPOINT:=}"                   # where stage 1 starts; default: as in the recipe
: "${HF_OUT:=exported/$name}"         # the Hugging Face directory at the end
: "${STAGE1_ITERS:=}"                 # default: as in the recipe
: "${STAGE2_ITERS:=epoch}"            # each token of the review data once

folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -e "$folder/../stage1_$name.sh" ]]; then
    first=("examples/stage1_$name.sh") second=("examples/stage2_$name.sh")
elif [[ -e "$folder/../recipes/$name-stage1.yaml" && -e "$folder/../recipes/$name-stage2.yaml" ]]; then
    first=(examples/train.sh "$name-stage1") second=(examples/train.sh "$name-stage2")
else
    echo "error: no examples/stage1_$name.sh, nor examples/recipes/$name-stage1.yaml and -stage2.yaml" >&2
    exit 1
fi

# submit AFTER SBATCH-ARGUMENT...: the new job's number.
submit() {
    sbatch --parsable --kill-on-invalid-dep=yes ${1:+--dependency=afterok:"$1"} "${@:2}"
}

unset LOAD SAVE TRAIN_ITERS
stage1=$(LOAD=$CHECKPOINT SAVE=$RUN/stage1 TRAIN_ITERS=$STAGE1_ITERS \
    submit "" "$@" "$folder/train.sbatch" "${first[@]}")
stage2=$(LOAD=$RUN/stage1 SAVE=$RUN/stage2 TRAIN_ITERS=$STAGE2_ITERS \
    submit "$stage1" "$@" "$folder/train.sbatch" "${second[@]}")
export_job=$(LOAD=$RUN/stage2 HF_OUT=$HF_OUT submit "$stage2" "$folder/single.sbatch" examples/export.sh)
echo "stage 1: $stage1, stage 2: $stage2, export: $export_job"
