#!/usr/bin/env bash
# Converts text to the datasets of both stages, one language each: DATA/train-el, DATA/review-el, DATA/valid-el, ...
# By default it reads the small demo corpus of this repository: set INPUT and VALID_INPUT to use your own text. Datasets
# that exist are left as they are.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${HF:=}"                                                   # directory of the dense model: its tokenizer is used
: "${DATA:=datasets/qwen1.5-1.8b}"                            # directory to write
: "${EXPANDED:=el hu tr}"                                     # languages to learn: train-, review- and valid-
: "${ORIGINAL:=en es zh}"                                     # languages that the dense model knows: review- and valid-
: "${INPUT:=$ROOT/data/help_corpus/train/LANGUAGE.jsonl.zst}"  # a file or glob; LANGUAGE is replaced
: "${VALID_INPUT:=$ROOT/data/help_corpus/valid/LANGUAGE.jsonl.zst}"  # the same for validation
: "${REVIEW_EXPANDED:=100000}"                                # documents of each expanded language in stage 2
: "${REVIEW_ORIGINAL:=50000}"                                 # documents of each original language in stage 2
: "${VALID_DOCUMENTS:=}"                                      # documents of each language in validation; default: all
: "${WORKERS:=}"                                              # processes; default: one a core
: "${PARTITION:=}"                                            # i/n: part i of train-*; merge/n: join, then the rest

need HF "the directory with the model's tokenizer"
need_file HF "$HF" "give the directory with the model's tokenizer"

# dataset PREFIX LANGUAGE PATTERN FLAG...
dataset() {
    local prefix=$1 language=$2 input=${3//LANGUAGE/$2}
    shift 3
    if [[ -e "$prefix.json" ]]; then
        echo "$prefix: already there"
        return
    fi
    [[ -e "$input" ]] || compgen -G "$input" >/dev/null ||
        die "no such file: $input (INPUT and VALID_INPUT, LANGUAGE=$language)"
    run "$PYTHON" "$ROOT/tools/preprocess_data.py" --input "$input" --language "$language" --tokenizer "$HF" \
        --output-prefix "$prefix" ${WORKERS:+--workers "$WORKERS"} "$@"
}

# as_glob PATH: a glob that matches PATH alone.
as_glob() {
    local glob=${1//\[/[[]}
    glob=${glob//\*/[*]}
    printf '%s' "${glob//\?/[?]}"
}

# train_part LANGUAGE: the whole, a partition, or the merge of partitions, as PARTITION says.
train_part() {
    local prefix=$DATA/train-$1 parts=$DATA/parts/train-$1 part
    case "$PARTITION" in
        "") dataset "$prefix" "$1" "$INPUT" ;;
        merge/*)
            [[ ! -e "$prefix.json" ]] || { echo "$prefix: already there"; return; }
            run "$PYTHON" "$ROOT/tools/merge_datasets.py" --output-prefix "$prefix" \
                --input "$(as_glob "$parts")-*-of-$(printf %05d "${PARTITION#*/}")"
            ;;
        *)
            part=$(printf '%05d-of-%05d' "${PARTITION%/*}" "${PARTITION#*/}")
            [[ ! -e "$parts-$part.json" ]] || { echo "$parts-$part: already there"; return; }
            dataset "$parts" "$1" "$INPUT" --partitions "$PARTITION"
            ;;
    esac
}

[[ "$PARTITION" =~ ^((merge|[0-9]+)/[0-9]+)?$ ]] || die "PARTITION=$PARTITION: i/n or merge/n"
read -r -d '' -a expanded_ones <<<"$EXPANDED" || true # line ends part words too
read -r -d '' -a original_ones <<<"$ORIGINAL" || true
for language in "${expanded_ones[@]}"; do train_part "$language"; done
[[ "$PARTITION" != [0-9]* ]] || exit 0
for language in "${expanded_ones[@]}"; do
    dataset "$DATA/review-$language" "$language" "$INPUT" --max-documents "$REVIEW_EXPANDED"
done
for language in "${original_ones[@]}"; do
    dataset "$DATA/review-$language" "$language" "$INPUT" --max-documents "$REVIEW_ORIGINAL"
done
for language in "${expanded_ones[@]}" "${original_ones[@]}"; do
    dataset "$DATA/valid-$language" "$language" "$VALID_INPUT" ${VALID_DOCUMENTS:+--max-documents "$VALID_DOCUMENTS"}
done
