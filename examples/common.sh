# shellcheck shell=bash
# Shared by the example scripts: checks before the start. Sourced, not run. Variables for all scripts:
#
#   PLATFORM       cuda, or cpu to try the scripts without GPUs
#   GPUS_PER_NODE  ranks on each node; default: all GPUs that nvidia-smi shows (PLATFORM=cpu: 1)
#   NUM_NODES      default: those of the SLURM job, else 1
#   MIN_NODES      training may go on with as few nodes, see docs/slurm.md; default: all NUM_NODES are needed
#   DRY_RUN=1      print the command, the layout and the memory estimate; start nothing
#   GPU_MEMORY     GiB of one GPU, for the estimate; default: what nvidia-smi says
#   LOG_DIR        where each rank's output goes; default: SAVE/logs
#   PYTHON         the Python interpreter; default: python

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
: "${PYTHON:=python}" "${PLATFORM:=cuda}" "${DRY_RUN:=0}"

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
    show "$@"
    [[ "$DRY_RUN" == 1 ]] || "$@"
}

show() {
    printf '%q ' "$@"
    echo
}

# convert FLAG...: upcycle a dense Hugging Face model.
convert() {
    need HF "the directory of the dense model"
    need_file HF "$HF/config.json" "HF must be the directory of a dense Hugging Face model"
    run "$PYTHON" "$ROOT/tools/convert_hf.py" import --hf "$HF" --save "$SAVE" --num-experts "$NUM_EXPERTS" \
        --top-k "$TOP_K" "$@"
}
