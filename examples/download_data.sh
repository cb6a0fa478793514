#!/usr/bin/env bash
# Downloads the paper's corpora from the Hugging Face hub: CulturaX, SlimPajama for English, SkyPile for Chinese. First
# run it with DRY_RUN=1, which only prints files, sizes and terms of use. For CulturaX accept its conditions on the hub
# and log in (`hf auth login`). Started again, it continues where it stopped. Next:
#   INPUT='corpus/train/LANGUAGE/*' VALID_INPUT='corpus/valid/LANGUAGE/*' VALID_DOCUMENTS=2000 bash examples/preprocess.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${CORPUS:=corpus}"                                       # directory to write: CORPUS/train/el/ and so on
: "${LANGUAGES:=el=30 hu=30 tr=30 en=8 es=1 zh=1}"          # languages, and the number of training files of each
: "${VALID_SHARDS:=1}"                                      # files for validation, after those
: "${REVISION:=main}"                                       # branch or commit; corpus.json records the commits

read -r -d '' -a languages <<<"$LANGUAGES" || true # line ends part words too
command=("$PYTHON" "$ROOT/tools/download_data.py" --output "$CORPUS" --languages "${languages[@]}"
    --valid-shards "$VALID_SHARDS" --revision "$REVISION")
[[ "$DRY_RUN" != 1 ]] || command+=(--dry-run)
show "${command[@]}" "$@"
"${command[@]}" "$@"
