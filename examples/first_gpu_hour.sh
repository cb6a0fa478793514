#!/usr/bin/env bash
# The first thing to run on a GPU: is what it computes right, and how fast is it? Ten minutes at most, on one GPU,
# without a network; needs this package with its tests' packages (pip install -e '.[test]'), nothing else. Prints a table
# and writes runs/first_gpu_hour.json. Further arguments: --output FILE, --quick (tiny sizes), --only NAME... (some parts).
# PYTHON is the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" -m benchmarks.gpu.first_hour "$@"
