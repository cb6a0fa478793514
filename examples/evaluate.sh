#!/usr/bin/env bash
# Runs the paper's and other multilingual benchmarks by lm_eval, on the dense model and on the exported one. Prints a
# table and writes OUT/benchmarks.json. Needs `pip install -e '.[eval]' -c constraints.txt` and access to the Hugging
# Face hub. Started again, it continues where it stopped. Further arguments go to tools/benchmarks.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${HF:=}"                                     # directory of the dense model
: "${HF_OUT:=exported/qwen1.5-1.8b-moe-lpr}"    # what export.sh wrote
: "${OUT:=evaluation/qwen1.5-1.8b-moe-lpr}"     # where to write
: "${EXPANDED:=el hu tr}"                       # languages that stage 1 taught
: "${ORIGINAL:=en es zh}"                       # languages that the dense model knows
: "${BENCHMARKS:=arc hellaswag mmlu belebele}"  # also: include global_mmlu xstorycloze xcopa xwinograd mgsm sib200
                                                # multiblimp, and flores, only for language pairs with Spanish
: "${CHAT_TEMPLATE:=auto}"                      # ask through the models' chat template: on, off, auto: instruct models
: "${MULTITURN:=1}"                             # with a chat template: examples as earlier turns; 0: in the question
: "${MODEL:=hf}"                                # lm_eval's kind of model: hf or vllm
: "${MODEL_ARGS:=dtype=auto}"                   # for vllm on 8 GPUs: dtype=auto,data_parallel_size=8
: "${BATCH_SIZE:=auto}"                         # lm_eval's
: "${DEVICE:=}"                                 # lm_eval's; default: cpu for PLATFORM=cpu, else lm_eval decides
: "${LAUNCHER:=}"                               # for hf on 8 GPUs: accelerate launch --num_processes 8 -m lm_eval
: "${LIMIT:=}"                                  # only the first N questions of each task, for a trial

need HF "the directory of the dense model"
need_file HF "$HF/config.json" "HF must be the directory of a dense Hugging Face model"
need_file HF_OUT "$HF_OUT/config.json" "export.sh writes it"
[[ "$PLATFORM" != cpu ]] || DEVICE=${DEVICE:-cpu}
read -r -d '' -a original_ones <<<"$ORIGINAL" || true # line ends part words too
read -r -d '' -a expanded_ones <<<"$EXPANDED" || true
read -r -d '' -a benchmarks <<<"$BENCHMARKS" || true
((${#expanded_ones[@]} && ${#original_ones[@]})) || die "EXPANDED='$EXPANDED' ORIGINAL='$ORIGINAL': name languages"

command=("$PYTHON" "$ROOT/tools/benchmarks.py" --base "$HF" --final "$HF_OUT" --output "$OUT"
    --original-languages "${original_ones[@]}" --expanded-languages "${expanded_ones[@]}"
    --benchmarks "${benchmarks[@]}" --apply-chat-template "$CHAT_TEMPLATE"
    --model "$MODEL" --model-args "$MODEL_ARGS" --batch-size "$BATCH_SIZE")
[[ "$MULTITURN" != 0 ]] || command+=(--no-fewshot-as-multiturn)
[[ -z "$DEVICE" ]] || command+=(--device "$DEVICE")
[[ -z "$LAUNCHER" ]] || command+=(--launcher "$LAUNCHER")
[[ -z "$LIMIT" ]] || command+=(--limit "$LIMIT")
[[ "$DRY_RUN" != 1 ]] || command+=(--dry-run)
show "${command[@]}" "$@"
"${command[@]}" "$@"
