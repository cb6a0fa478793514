"""A rank that does not answer is named by those that wait for it."""

import os
import signal
import subprocess
import sys

import pytest

from tests.distributed import free_port

RANK = """
import ctypes, os, signal, sys, time
import torch, torch.distributed as dist
from megatron_moe_lpr import liveness
from megatron_moe_lpr.training.watchdog import examination as module
from megatron_moe_lpr.training.watchdog.heartbeat import Heartbeat

def wait_for_the_other():
    dist.all_reduce(torch.ones(1))

def hang_in_c():
    ctypes.CDLL(None).sleep(300)

def work_long():
    for _ in range(32):
        time.sleep(0.5)
        liveness.advance()

def poll():
    while True:
        time.sleep(0.05)

module.SILENCE_SECONDS = 5.0
how = sys.argv[1]
with Heartbeat(timeout=10.0) as heartbeat:
    dist.init_process_group("gloo")
    heartbeat.step = 7
    dist.barrier()
    time.sleep(3 * heartbeat.period)
    if dist.get_rank() == dist.get_world_size() - 1:
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "long":
            work_long()
        elif how == "polls":
            with liveness.long_work("building index maps"):
                poll()
        else:
            with liveness.waiting_for("reading a batch"):
                hang_in_c()
    wait_for_the_other()
    dist.destroy_process_group()  # gloo's threads abort a process that ends before them
"""


def run_ranks(how: str) -> tuple[int, str]:
    """Exit code and errors of rank 0, where rank 1 comes late or never."""
    return run_both(how)[0]


def run_both(how: str) -> list[tuple[int, str]]:
    """Exit code and errors of both ranks; of rank 1, which may be stopped, after rank 0 has ended."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", RANK, how]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        _, errors = ranks[0].communicate(timeout=200)
        if how != "stopped":
            ranks[1].wait(timeout=60)
    finally:
        ranks[1].send_signal(signal.SIGCONT)
        ranks[1].kill()
        _, others = ranks[1].communicate()
    texts = (text.replace(str(ranks[1].pid), "PROCESS") for text in (errors, others))
    return list(zip((rank.returncode for rank in ranks), texts, strict=True))


def test_a_stopped_rank_is_named_with_step_and_collective():
    code, errors = run_ranks("stopped")
    assert code == 1, errors
    line = next(line for line in errors.splitlines() if line.startswith("error: "))
    assert line.startswith("error: step 7: no answer from rank 1 (process PROCESS on ")
    assert "last seen in step 7 at " in line
    assert "rank 0 waits at all_reduce in wait_for_the_other" in line


def error_line(errors: str) -> str:
    return next(line for line in errors.splitlines() if line.startswith("error: "))


def test_a_rank_that_works_for_long_is_not_ended():
    """Sixteen seconds of work at a timeout of ten; the other rank waits meanwhile, and says for what."""
    (code, errors), (other_code, other_errors) = run_both("long")
    assert (code, other_code) == (0, 0), errors + other_errors
    assert "warning: step 7: " in errors and "every rank answers" in errors
    assert "error:" not in errors + other_errors


@pytest.mark.parametrize(("how", "doing"), [("hangs", "reading a batch"), ("polls", "building index maps")])
def test_a_rank_that_hangs_ends_and_so_do_those_that_wait_for_it(how, doing):
    """In C without an end, and in a loop that polls inside long work: no gloo timeout of 30 minutes is waited for."""
    (code, errors), (other_code, other_errors) = run_both(how)
    assert (code, other_code) == (1, 1), errors + other_errors
    line, other_line = error_line(errors), error_line(other_errors)
    assert other_line.startswith(f"error: step 7: rank 1 hangs {doing}, at ")
    assert "no progress for" in other_line and "--distributed-timeout-minutes" in other_line
    assert "rank 0 has waited" in line and "all_reduce in wait_for_the_other" in line
    assert "rank 1 (process PROCESS on " in line and doing in line
    function = "hang_in_c" if how == "hangs" else "poll"
    assert f"in {function}" in other_errors and "its stack" not in errors


LOCKED = """
import ctypes
from megatron_moe_lpr.training.watchdog.heartbeat import Heartbeat

def hang_with_the_lock():
    ctypes.PyDLL(None).sleep(300)

with Heartbeat(timeout=3.0):
    hang_with_the_lock()
"""


def test_a_process_none_of_whose_threads_can_run_ends_too():
    done = subprocess.run([sys.executable, "-c", LOCKED], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.startswith("error: rank 0 (process ") and "holds Python's lock in native code" in done.stderr
    assert "in hang_with_the_lock" in done.stderr


ALONE = """
import sys, threading
from megatron_moe_lpr.training.watchdog.heartbeat import Heartbeat
with Heartbeat(timeout=3.0, before_end=lambda: print("released", flush=True)):
    threading.Event().wait(120)
"""


def test_a_single_process_without_process_groups_ends_too():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: step 0: rank 0 hangs at wait (threading.py:")
    assert "threading.Event().wait" in done.stderr or 'File "<string>"' in done.stderr
    assert done.stdout == "released\n"
