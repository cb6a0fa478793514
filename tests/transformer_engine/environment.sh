#!/usr/bin/env bash
# A virtual environment with Transformer Engine's Python part and none of its CUDA libraries, for tests only.
#
#   [TE_VERSION=2.20] [CONSTRAINTS=FILE] tests/transformer_engine/environment.sh DIRECTORY [PYTHON]
#
# TE_VERSION is one that tests/emulation/tables has, CONSTRAINTS a file of pip's with the versions of megatron-core,
# torch and the rest, PYTHON any for which these have wheels.
# It is an environment of its own because the bare package raises RuntimeError wherever the tests' stand-in is absent.
set -euo pipefail

directory=${1:?error: give the directory of the virtual environment}
python=${2:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
constraints=${CONSTRAINTS:-$root/constraints.txt}

wanted=${TE_VERSION:-2.11.0}
for table in "$root/tests/emulation/tables/$wanted".txt "$root/tests/emulation/tables/$wanted".*.txt; do
    [ ! -e "$table" ] || version=$(basename "$table" .txt)
done
if [ -z "${version:-}" ]; then
    known=$(cd "$root/tests/emulation/tables" && echo *.txt)
    echo "error: TE_VERSION=$wanted: the emulation knows Transformer Engine ${known//.txt/}" >&2
    exit 1
fi

"$python" -m venv "$directory"
"$directory/bin/python" -m pip install --quiet --constraint "$constraints" --editable "${root}[test]"
"$directory/bin/python" -m pip install --quiet triton einops onnx onnxscript pydantic
# --no-deps: its dependencies are the CUDA libraries, 2 GB that nothing here can run.
"$directory/bin/python" -m pip install --quiet --no-deps "transformer-engine==$version"
