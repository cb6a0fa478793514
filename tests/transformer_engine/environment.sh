#!/usr/bin/env bash
# A virtual environment with Transformer Engine's Python part and none of its CUDA libraries, for tests only.
#
#   tests/transformer_engine/environment.sh DIRECTORY [PYTHON]
#
# It is an environment of its own because the bare package raises RuntimeError wherever the tests' stand-in is absent.
set -euo pipefail

directory=${1:?error: give the directory of the virtual environment}
python=${2:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$python" -m venv "$directory"
"$directory/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" --editable "$root[test]"
"$directory/bin/python" -m pip install --quiet triton einops onnx onnxscript pydantic
# --no-deps: its dependencies are the CUDA libraries, 2 GB that nothing here can run.
"$directory/bin/python" -m pip install --quiet --no-deps transformer-engine==2.11.0
