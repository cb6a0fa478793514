"""The launcher around torchrun: exit codes, and a signal that reaches the workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_moe_lpr.launch import exit_code, last_lines
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_there_are_workers_asks_for_another_start(number, tmp_path):
    """While torch is still being imported."""
    command = [sys.executable, "-m", "megatron_moe_lpr.launch", "--nproc-per-node", "1", str(tmp_path / "none.py")]
    launcher = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    # Python's own start, before any of our lines: a handler must be there.
    deadline = time.monotonic() + 120
    while not handles(launcher.pid, number) and time.monotonic() < deadline:
        time.sleep(0.002)
    launcher.send_signal(number)
    assert launcher.wait(120) == EXIT_REQUEUE


STARTING = """
import signal, threading
from megatron_moe_lpr.training.signals import StopRequest

start = threading.Thread.start

def watched(thread):
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
    start(thread)

threading.Thread.start = watched
StopRequest(nothing_to_save=True)
print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""


def test_no_handler_may_leave_out_of_the_start_of_a_thread():
    """Seen once: exit code 1 and `release unlocked lock`."""
    result = subprocess.run(
        [sys.executable, "-c", STARTING], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.split() == ["True", "False"]


def handles(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal, as Linux tells."""
    status = Path(f"/proc/{process}/status").read_text()
    mask = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(mask >> (number - 1) & 1)


def test_last_lines(tmp_path):
    assert last_lines(tmp_path / "none") == []
    (tmp_path / "log").write_text("\n".join(f"line {number}" for number in range(5000)))
    assert last_lines(tmp_path / "log", 3) == ["line 4997", "line 4998", "line 4999"]


def test_the_last_lines_of_ranks_not_shown_are_told_when_one_fails(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import os, sys\nprint('seen by', os.environ['RANK'], flush=True)\nsys.exit(3)")
    flags = ["--nproc-per-node", "2", "--master-port", "29521", "--log-dir", tmp_path, "--tee", "3"]
    command = [sys.executable, "-m", "megatron_moe_lpr.launch", *flags, "--local-ranks-filter", "0", script]
    result = subprocess.run(
        [str(part) for part in command], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 3
    shown = [line for line in result.stderr.splitlines() if line.startswith("--- local rank")]
    assert shown == ["--- local rank 1, end of stdout.log"], result.stderr
    assert "seen by 1" in result.stderr
