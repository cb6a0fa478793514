# shellcheck shell=bash
# Shared by the example scripts: checks before the start, and the launch. Sourced, not run. Variables for all scripts:
#
#   PLATFORM       cuda, or cpu to try the scripts without GPUs
#   GPUS_PER_NODE  ranks on each node; default: all GPUs that nvidia-smi shows (PLATFORM=cpu: 1)
#   NUM_NODES      default: those of the SLURM job, else 1
#   DRY_RUN=1      print the command, the layout and the memory estimate; start nothing
#   FP8=1          matrix products in FP8 (FP8_RECIPE=delayed, the default, or blockwise); default: bf16
#   GPU_MEMORY     GiB of one GPU, for the estimate; default: what nvidia-smi says
#   LOG_DIR        where each rank's output goes; default: SAVE/logs
#   PYTHON         the Python interpreter; default: python

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
: "${PYTHON:=python}" "${PLATFORM:=cuda}" "${DRY_RUN:=0}" "${FP8:=0}" "${FP8_RECIPE:=delayed}"

die() {
    echo "error: $*" >&2
    exit 1
}

# need NAME WHAT: the variable NAME must be set.
need() {
    [[ -n "${!1:-}" ]] || die "$1 is not set; give $2, for example $1=... bash $0"
}

# need_file NAME PATH HINT: a file or directory that NAME leads to must exist.
need_file() {
    [[ -e "$2" ]] || die "$1: $2 does not exist; $3"
}

# need_numbers NAME...: these variables must hold numbers of 1 or more.
need_numbers() {
    local name
    for name in "$@"; do
        [[ "${!name}" =~ ^[1-9][0-9]{0,9}$ ]] || die "$name=${!name}: a whole number of 1 or more is expected"
    done
}

# run COMMAND...: run it, or under DRY_RUN only show it.
run() {
    show "$@"
    [[ "$DRY_RUN" == 1 ]] || "$@"
}

show() {
    printf '%q ' "$@"
    echo
}

# Sets GPUS_PER_NODE, NUM_NODES and GPU_MEMORY.
find_gpus() {
    NUM_NODES=${NUM_NODES:-${SLURM_NNODES:-1}}
    need_numbers NUM_NODES ${GPUS_PER_NODE:+GPUS_PER_NODE}
    if [[ "$PLATFORM" == cpu ]]; then
        GPUS_PER_NODE=${GPUS_PER_NODE:-1} GPU_MEMORY=${GPU_MEMORY:-80}
        return
    fi
    [[ "$PLATFORM" == cuda ]] || die "PLATFORM=$PLATFORM: cuda or cpu"
    local found
    found=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null) ||
        die "no GPU: nvidia-smi does not answer on $(hostname); PLATFORM=cpu runs without one"
    GPUS_PER_NODE=${GPUS_PER_NODE:-$(wc -l <<<"$found")}
    GPU_MEMORY=${GPU_MEMORY:-$(awk 'NR == 1 { printf "%.1f", $1 / 1024 }' <<<"$found")}
    ((GPUS_PER_NODE <= $(wc -l <<<"$found"))) ||
        die "GPUS_PER_NODE=$GPUS_PER_NODE, but $(hostname) has $(wc -l <<<"$found")"
}

# read_languages: EXPANDED and ORIGINAL as arrays, and the validation data of all.
read_languages() {
    local language
    read -r -d '' -a expanded_ones <<<"$EXPANDED" || true # line ends part words too
    read -r -d '' -a original_ones <<<"$ORIGINAL" || true
    ((${#expanded_ones[@]} && ${#original_ones[@]})) ||
        die "EXPANDED='$EXPANDED' ORIGINAL='$ORIGINAL': name languages, as in 'el hu'"
    valid_data=()
    for language in "${expanded_ones[@]}" "${original_ones[@]}"; do add_dataset valid_data "valid-$language"; done
}

# add_dataset ARRAY NAME [WEIGHT]: append a dataset of preprocess.sh, DATA/NAME, to ARRAY; it must be there.
add_dataset() {
    local -n array=$1
    need_file DATA "$DATA/$2.idx" "preprocess.sh writes it"
    array+=(${3:+"$3"} "$DATA/$2")
}

# one_epoch PREFIX...: steps that draw every token of the datasets once.
one_epoch() {
    need_numbers GLOBAL_BATCH SEQ_LENGTH
    "$PYTHON" -c '
import json, sys
tokens = sum(json.load(open(f"{prefix}.json"))["tokens"] for prefix in sys.argv[2:])
print(max(1, tokens // int(sys.argv[1])))' "$((GLOBAL_BATCH * SEQ_LENGTH))" "$@"
}

# estimate STAGE: layout and memory of this run; stops where they don't fit.
estimate() {
    local precision=bf16
    [[ "$PLATFORM" == cuda ]] || precision=fp32
    [[ "$FP8" == 0 ]] || precision=fp8
    "$PYTHON" "$ROOT/tools/plan.py" --load "$LOAD" --stage "$1" --gpus $((GPUS_PER_NODE * NUM_NODES)) \
        --gpus-per-node "$GPUS_PER_NODE" --gpu-memory "$GPU_MEMORY" "${layout[@]}" --seq-length "$SEQ_LENGTH" \
        --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --precision "$precision" \
        --recompute "$RECOMPUTE"
}

# convert FLAG...: upcycle a dense Hugging Face model.
convert() {
    need HF "the directory of the dense model"
    need_file HF "$HF/config.json" "HF must be the directory of a dense Hugging Face model"
    run "$PYTHON" "$ROOT/tools/convert_hf.py" import --hf "$HF" --save "$SAVE" --num-experts "$NUM_EXPERTS" \
        --top-k "$TOP_K" "$@"
}

# train_stage1 FLAG...: every expanded language with the same weight.
train_stage1() {
    local language train_data=()
    need_file LOAD "$LOAD" "a convert_*.sh writes it"
    read_languages
    for language in "${expanded_ones[@]}"; do add_dataset train_data "train-$language" 1; done
    train 1 "$@"
}

# train_stage2 FLAG...: each dataset by its size, so that one pass draws every document once.
train_stage2() {
    local language train_data=()
    need_file LOAD "$LOAD" "it is SAVE of stage1_*.sh"
    read_languages
    for language in "${original_ones[@]}" "${expanded_ones[@]}"; do add_dataset train_data "review-$language"; done
    TRAIN_ITERS=${TRAIN_ITERS:-$(one_epoch "${train_data[@]}")}
    train 2 "$@"
}

# tell_save FLAG...: write SAVE, or the --save among the flags, to the file SAVE_FILE, as it is: a batch script that
# needs it cannot read it back from the command that is shown.
tell_save() {
    local place=$SAVE
    while (($#)); do
        case "$1" in
            --save) place=${2:-} ;;
            --save=*) place=${1#--save=} ;;
        esac
        shift
    done
    printf '%s\0' "$place" >"$SAVE_FILE"
}

# train STAGE FLAG...: start this stage's run on this node.
train() {
    local stage=$1 precision=() recompute=() layout command logs
    shift
    find_gpus
    layout=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --expert-model-parallel-size "$EP")
    case "${RECOMPUTE:=none}" in
        none) ;;
        moe) recompute=(--recompute-granularity selective --recompute-modules moe) ;;
        full) recompute=(--recompute-granularity full) ;;
        *) die "RECOMPUTE=$RECOMPUTE: none, moe or full" ;;
    esac
    [[ "$PLATFORM" == cpu ]] || precision=(--bf16)
    local format=hybrid
    # With a scale for each block E4M3 has the range for gradients too.
    [[ "$FP8_RECIPE" != blockwise ]] || format=e4m3
    [[ "$FP8" == 0 ]] || precision+=(--fp8-format "$format" --fp8-recipe "$FP8_RECIPE")
    logs=${LOG_DIR:-$SAVE/logs}/node${SLURM_NODEID:-0}
    # Inside a step of a SLURM job the batch script has shown and checked this already, once for all nodes.
    [[ -n "${SLURM_STEP_ID:-}" && "$DRY_RUN" != 1 ]] || estimate "$stage"
    command=("$PYTHON" -m megatron_moe_lpr.launch --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NUM_NODES" \
        --node-rank "${SLURM_NODEID:-0}" --master-addr "${MASTER_ADDR:-127.0.0.1}" \
        --master-port "${MASTER_PORT:-29500}" --log-dir "$logs" --tee 3 --local-ranks-filter 0 \
        -m megatron_moe_lpr.pretrain --stage "$stage" --platform "$PLATFORM" \
        --load "$LOAD" --save "$SAVE" --save-interval "$SAVE_INTERVAL" --log-interval "${LOG_INTERVAL:-10}" \
        --data-path "${train_data[@]}" --valid-data-path "${valid_data[@]}" --original-languages "${original_ones[@]}" \
        --train-iters "$TRAIN_ITERS" --lr "$LR" --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH" \
        --global-batch-size "$GLOBAL_BATCH" --use-distributed-optimizer --overlap-grad-reduce \
        "${layout[@]}" "${recompute[@]}" "${precision[@]}" "$@")
    show "${command[@]}"
    [[ -z "${SAVE_FILE:-}" ]] || tell_save "$@"
    [[ "$DRY_RUN" != 1 ]] || return 0
    mkdir -p "$logs"
    echo $$ >"$logs/launcher.pid" # `kill -USR1` it, and the run saves and stops
    exec "${command[@]}"
}
