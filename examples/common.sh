# shellcheck shell=bash
# What the example scripts share: checks that stop before anything is started, and the launch. Sourced, not run.
#
#   PLATFORM       cuda, or cpu to try the scripts without GPUs
#   GPUS_PER_NODE  ranks on each node; default: all GPUs that nvidia-smi shows (PLATFORM=cpu: 1)
#   NUM_NODES      default: those of the SLURM job, else 1
#   DRY_RUN=1      print the command, the layout and the memory estimate, and start nothing
#   FP8=1          matrix products in FP8 (Hopper: FP8_RECIPE=delayed, or blockwise), else bf16
#   GPU_MEMORY     GiB of one GPU, for the estimate; default: what nvidia-smi says
#   LOG_DIR        where each rank's output goes; default: SAVE/logs
#   PYTHON         the interpreter

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
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

# run COMMAND...: run it, or under DRY_RUN only show it.
run() {
    printf '%q ' "$@"
    echo
    [[ "$DRY_RUN" == 1 ]] || "$@"
}

# Sets GPUS_PER_NODE, NUM_NODES and GPU_MEMORY.
find_gpus() {
    NUM_NODES=${NUM_NODES:-${SLURM_NNODES:-1}}
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

# prefixes PART LANGUAGE...: the datasets that preprocess.sh wrote, DATA/PART-LANGUAGE.
prefixes() {
    local part=$1 language
    shift
    for language in "$@"; do echo "$DATA/$part-$language"; done
}

# one_epoch PREFIX...: steps that draw every token of the datasets once.
one_epoch() {
    "$PYTHON" -c '
import json, sys
tokens = sum(json.load(open(f"{prefix}.json"))["tokens"] for prefix in sys.argv[2:])
print(max(1, tokens // int(sys.argv[1])))' "$((GLOBAL_BATCH * SEQ_LENGTH))" "$@"
}

layout_flags() {
    LAYOUT=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --expert-model-parallel-size "$EP")
}

# estimate STAGE: layout and memory of this run; stops where they don't fit.
estimate() {
    "$PYTHON" "$ROOT/tools/plan.py" --load "$LOAD" --stage "$1" --gpus $((GPUS_PER_NODE * NUM_NODES)) \
        --gpus-per-node "$GPUS_PER_NODE" --gpu-memory "$GPU_MEMORY" "${LAYOUT[@]}" --seq-length "$SEQ_LENGTH" \
        --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" "${RECOMPUTE_FLAGS[@]}"
}

# train STAGE FLAG...: start this stage's run on this node.
train() {
    local stage=$1 prefix precision=() logs
    shift
    need_file LOAD "$LOAD" "convert_*.sh writes it (stage 2 starts from stage 1's SAVE)"
    for prefix in "${TRAIN_DATA[@]}" "${VALID_DATA[@]}"; do
        [[ "$prefix" == [0-9.]* && "$prefix" != */* ]] || need_file DATA "$prefix.idx" "preprocess.sh writes it"
    done
    find_gpus
    layout_flags
    RECOMPUTE_FLAGS=()
    [[ -z "${RECOMPUTE:-}" ]] || RECOMPUTE_FLAGS=(--recompute-granularity "$RECOMPUTE")
    [[ "$PLATFORM" == cpu ]] || precision=(--bf16)
    [[ "$FP8" == 0 ]] || precision+=(--fp8-format hybrid --fp8-recipe "$FP8_RECIPE")
    logs=${LOG_DIR:-$SAVE/logs}/node${SLURM_NODEID:-0}
    # Inside a step of a SLURM job the batch script has shown and checked this already, once for all nodes.
    [[ -n "${SLURM_STEP_ID:-}" && "$DRY_RUN" != 1 ]] || estimate "$stage"
    run "$PYTHON" -m megatron_moe_lpr.launch --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NUM_NODES" \
        --node-rank "${SLURM_NODEID:-0}" --master-addr "${MASTER_ADDR:-127.0.0.1}" \
        --master-port "${MASTER_PORT:-29500}" --log-dir "$logs" --tee 3 --local-ranks-filter 0 \
        -m megatron_moe_lpr.pretrain --stage "$stage" --platform "$PLATFORM" \
        --load "$LOAD" --save "$SAVE" --save-interval "$SAVE_INTERVAL" --log-interval "${LOG_INTERVAL:-10}" \
        --data-path "${TRAIN_DATA[@]}" --valid-data-path "${VALID_DATA[@]}" --original-languages "${ORIGINAL[@]}" \
        --train-iters "$TRAIN_ITERS" --lr "$LR" --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH" \
        --global-batch-size "$GLOBAL_BATCH" --use-distributed-optimizer --overlap-grad-reduce \
        "${LAYOUT[@]}" "${RECOMPUTE_FLAGS[@]}" "${precision[@]}" "$@"
}
