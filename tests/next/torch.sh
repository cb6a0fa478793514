#!/usr/bin/env bash
# Installs torch in the version of a file of constraints; its CUDA build without the CUDA libraries, for tests only.
#
#   tests/next/torch.sh PYTHON CONSTRAINTS
set -euo pipefail

python=${1:?error: give the Python to install into}
constraints=${2:?error: give a file of constraints}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

"$python" -m pip install --quiet --no-deps --constraint "$constraints" torch
# "13.0", or nothing where pip found a build without CUDA.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cuda=$(sed -n "s/^cuda.*= '\(.*\)'$/\1/p" "$packages/torch/version.py")
if [ -n "$cuda" ]; then
    "$python" -m pip install --quiet --no-deps "nvidia-cuda-runtime==$cuda.*"
    "$python" "$here/stand_ins.py"
fi
