"""Child processes end with their parent, in whatever way it ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_moe_lpr import processes

PARENT = """
import multiprocessing, sys, time
from tests.test_processes import child

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    process = context.Process(target=child, args=(sys.argv[2] == "kernel",))
    process.start()
    print(process.pid, flush=True)
    time.sleep(300)
"""


def child(kernel: bool) -> None:
    """Run as the child: change the working directory when ready, and wait to be ended."""
    if not kernel:
        processes._request_death_signal = lambda number: False
    processes.end_with_parent()
    os.chdir("/")
    time.sleep(300)


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("watch", ["kernel", "poll"])
def test_a_child_ends_when_its_parent_is_killed(method, watch, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(tmp_path / "parent.py"), method, watch]
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    orphan = psutil.Process(int(parent.stdout.readline()))
    wait_until(lambda: orphan.cwd() == "/")
    assert is_alive(orphan)
    parent.kill()
    parent.communicate()
    wait_until(lambda: not is_alive(orphan))


def orphaned() -> None:
    processes.end_with_parent(parent=os.getppid() + 1)
    time.sleep(300)


def test_a_child_whose_parent_is_gone_already_ends_at_once():
    process = multiprocessing.get_context("fork").Process(target=orphaned)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_number_and_start_tell_processes_apart():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert processes.start_time(ended.pid) is None
    expected = psutil.Process().create_time()
    if sys.platform == "linux":
        expected = (expected - psutil.boot_time()) * os.sysconf("SC_CLK_TCK")
    assert processes.start_time(os.getpid()) == pytest.approx(expected, abs=1)
