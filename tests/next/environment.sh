#!/usr/bin/env bash
# A virtual environment with the newest stack, for tests only: Python 3.12 or newer, megatron-core 0.19, newest torch.
#
#   tests/next/environment.sh DIRECTORY PYTHON
#
# The package index has no CPU build of torch for these Pythons. Its CUDA build is installed without the CUDA libraries
# (2.2 GB), which stand_ins.py replaces.
set -euo pipefail

directory=${1:?error: give the directory of the virtual environment}
python=${2:?error: give a Python of version 3.12 or newer}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
    echo "error: $python is no Python 3.12 or newer that runs; pass NEXT_PYTHON=/path/to/python3.12" >&2
    exit 1
fi
"$python" -m venv "$directory"
bash "$root/tests/next/torch.sh" "$directory/bin/python" "$root/constraints.txt"
"$directory/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" --editable "${root}[test]"
"$directory/bin/python" -m pip check
