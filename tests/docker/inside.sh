#!/usr/bin/env bash
# Inside an image, as its user: the short form of the demo, and a few tests. With the argument `quick`, the tests alone.
set -euo pipefail

if [ "$(id -u)" = 0 ]; then
    echo "error: the image runs as root; it should have a user of its own" >&2
    exit 1
fi
echo "user $(id -u), home ${HOME:-none}, $(python --version), torch $(python -c 'import torch; print(torch.__version__)')"
tests="tests/test_command_line.py tests/conversion/test_round_trip.py tests/platform/test_cpu.py"
if [ "${1:-}" != quick ]; then
    # Every step of the method: text to tokens, conversion, 20 steps of each stage on two ranks, evaluation, export and
    # its logits, a report.
    STAGE1_ITERS=20 STAGE2_ITERS=20 VALIDATION_DOCUMENTS=2 RANKS=2 make demo
    tests+=" tests/launching/test_shell.py"
fi
make test TESTS="$tests --durations=3 -rs"
