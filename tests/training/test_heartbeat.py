"""A rank that does not answer is named by those that wait for it."""

import os
import signal
import subprocess
import sys

from tests.distributed import free_port

RANK = """
import os, signal, sys, time
import torch, torch.distributed as dist
from megatron_moe_lpr.training import heartbeat as module
from megatron_moe_lpr.training.heartbeat import Heartbeat

def wait_for_the_other():
    dist.all_reduce(torch.ones(1))

module.SILENCE_SECONDS = 5.0
dist.init_process_group("gloo")
stopped = sys.argv[1] == "stopped"
with Heartbeat(timeout=10.0) as heartbeat:
    heartbeat.step = 7
    dist.barrier()
    time.sleep(3 * heartbeat.period)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP) if stopped else time.sleep(16)
    wait_for_the_other()
"""


def run_ranks(how: str) -> tuple[int, str]:
    """Exit code and errors of rank 0, where rank 1 comes late or never."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", RANK, how]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        _, errors = ranks[0].communicate(timeout=200)
    finally:
        ranks[1].send_signal(signal.SIGCONT)
        ranks[1].kill()
        ranks[1].communicate()
    return ranks[0].returncode, errors.replace(str(ranks[1].pid), "PROCESS")


def test_a_stopped_rank_is_named_with_step_and_collective():
    code, errors = run_ranks("stopped")
    assert code == 1, errors
    line = next(line for line in errors.splitlines() if line.startswith("error: "))
    assert line.startswith("error: step 7: no answer from rank 1 (process PROCESS on ")
    assert "last seen in step 7 at " in line
    assert "rank 0 waits at all_reduce in wait_for_the_other" in line


def test_a_rank_that_only_takes_long_is_not_ended():
    code, errors = run_ranks("late")
    assert code == 0, errors
    assert "warning: step 7: " in errors and "every rank answers" in errors
    assert "error:" not in errors
