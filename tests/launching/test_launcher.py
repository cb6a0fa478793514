"""The launcher around torchrun: exit codes, and a signal that reaches the workers."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_moe_lpr.launch import exit_code
from megatron_moe_lpr.training.signals import EXIT_REQUEUE
from tests.launching.builders import ROOT

WORKER = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
open(sys.argv[1] + os.environ["RANK"], "w").close()
deadline = time.monotonic() + 120
while not asked and time.monotonic() < deadline:
    time.sleep(0.05)
sys.exit(75 if asked else 1)
"""


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([75, 75], EXIT_REQUEUE),
        ([-signal.SIGUSR1, 75], EXIT_REQUEUE),
        ([75, -signal.SIGTERM], EXIT_REQUEUE),
        ([-signal.SIGTERM], 128 + signal.SIGTERM),
        ([75, 1], 1),
        ([-signal.SIGKILL], 128 + signal.SIGKILL),
    ],
)
def test_exit_codes(codes, expected):
    assert exit_code(codes) == expected


def test_signal_reaches_the_workers_and_their_exit_code_comes_back(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [
        "-m",
        "megatron_moe_lpr.launch",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29519",
        script,
        tmp_path / "up",
    ]
    launcher = subprocess.Popen(
        [sys.executable, *map(str, command)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"up{rank}").exists() for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.1)
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(120) == EXIT_REQUEUE
