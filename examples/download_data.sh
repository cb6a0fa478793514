#!/usr/bin/env bash
# Fetches the paper's corpora from the Hugging Face hub: CulturaX, SlimPajama for English, SkyPile for Chinese. DRY_RUN=1
# prints files, sizes and terms of use and fetches nothing. CulturaX asks you to accept its conditions and to log in
# (`hf auth login`). Started again, it goes on where it stopped. Afterwards:
#   INPUT='corpus/train/LANGUAGE/*' VALID_INPUT='corpus/valid/LANGUAGE/*' VALID_DOCUMENTS=2000 bash examples/preprocess.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${CORPUS:=corpus}"                                       # where to write: CORPUS/train/el/, CORPUS/valid/el/, ...
: "${LANGUAGES:=el=30 hu=30 tr=30 en=8 es=1 zh=1}"          # and of each, how many files for training
: "${VALID_SHARDS:=1}"                                      # the next so many files, for validation
: "${REVISION:=main}"                                       # of the data sets; corpus.json records the commits

read -ra languages <<<"$LANGUAGES"
command=("$PYTHON" "$ROOT/tools/download_data.py" --output "$CORPUS" --languages "${languages[@]}"
    --valid-shards "$VALID_SHARDS" --revision "$REVISION")
[[ "$DRY_RUN" != 1 ]] || command+=(--dry-run)
show "${command[@]}" "$@"
"${command[@]}" "$@"
