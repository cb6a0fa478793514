#!/usr/bin/env bash
# The last transformers of major version 4, in a virtual environment of its own.
#
#   tests/serving/transformers4.sh DIRECTORY [PYTHON]
set -euo pipefail

directory=${1:?error: give the directory of the virtual environment}
python=${2:-python3}

"$python" -m venv "$directory"
"$directory/bin/python" -m pip install --quiet torch==2.13.0 transformers==4.57.6 numpy
