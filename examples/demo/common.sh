# shellcheck shell=bash disable=SC2034  # sourced by scripts that use what is set here
# Shared by the demo's scripts: where things are, and steps that run once.
#
# step DONE TITLE COMMAND...   runs COMMAND unless the file DONE exists; DONE is made when it succeeds.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=${PYTHON:-python}
ORIGINAL="en es zh"
EXPANDED="el hu tr"
CORPUS=data/help_corpus
DATA=${DATA:-$RUNS/data}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Nothing here needs the network.
export HF_HUB_OFFLINE=1

# Ranks: two where there are two cores.
CORES=$($PYTHON -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
RANKS=${RANKS:-$((CORES >= 2 ? 2 : 1))}

# bf16 products are several times faster than fp32 ones on CPUs that have them in hardware, and slower on others.
if grep -qsw -e avx512_bf16 -e amx_bf16 /proc/cpuinfo; then PRECISION=${PRECISION:---bf16}; fi
PRECISION=${PRECISION:---fp32}

trap 'echo "interrupted; the same command goes on from here" >&2; exit 130' INT

step() {
    local done=$1 title=$2
    shift 2
    if [ -e "$done" ]; then
        echo "== $title: done before, reusing it"
        return
    fi
    echo "== $title"
    "$@"
    mkdir -p "$(dirname "$done")"
    [ -e "$done" ] || touch "$done"
}

# beside NAME COMMAND...: in the background, its lines marked with NAME; await waits for all of them, or fails.
beside() {
    local name=$1
    shift
    ("$@") > >(sed -u "s/^/$name | /") 2>&1 &
    STARTED+=($!)
}
STARTED=()

await() {
    local process failed=0
    for process in "${STARTED[@]}"; do wait "$process" || failed=1; done
    STARTED=()
    return $failed
}

# Where the machine's own name does not resolve, as in some containers, torchrun would wait five minutes and fail.
ranks() {
    "$PYTHON" -m torch.distributed.run --standalone --local-addr localhost --nproc-per-node "$RANKS" "$@"
}

# tokens NAME SPLIT LANGUAGE TOKENIZER ARGUMENTS...: the dataset $DATA/NAME-LANGUAGE.
tokens() {
    local name=$1 split=$2 language=$3 tokenizer=$4
    shift 4
    step "$DATA/$name-$language.json" "tokens of $name $language" \
        "$PYTHON" tools/preprocess_data.py --input "$CORPUS/$split/$language.jsonl.zst" --language "$language" \
        --tokenizer "$tokenizer" --output-prefix "$DATA/$name-$language" "$@"
}

# datasets SPLIT LANGUAGE...: their prefixes.
datasets() {
    local split=$1 language
    shift
    for language in "$@"; do echo "$DATA/$split-$language"; done
}
