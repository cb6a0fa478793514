"""Runs whose nodes come and go under torchrun: two launchers on this machine stand for two nodes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.launch import check_node_counts, end_without_rendezvous, exit_code
from megatron_moe_lpr.launch_restarts import Agent
from megatron_moe_lpr.training.signals import EXIT_REQUEUE
from tests.distributed import free_port
from tests.launching.builders import ROOT
from tests.training.runs import training_config

SECONDS = 240
"""Time limit of each wait, for a shared machine."""
WORKER = """
import os, signal, sys, time
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: asked.append(1))
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
open(f"{sys.argv[1]}/rank{dist.get_rank()}of{dist.get_world_size()}", "w").close()
while True:
    flag = torch.tensor(len(asked))
    dist.all_reduce(flag)
    if flag:
        os._exit(75)
    time.sleep(0.05)
"""


@pytest.fixture
def node(tmp_path):
    """Return a function that starts the launcher of a node of 1 to 2."""
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "up").mkdir()
    started, port = [], free_port()

    def start(holds_rendezvous: bool) -> subprocess.Popen:
        # Torch's defaults, but for the wait for further nodes: a busy machine must not take a living node for lost.
        conf = f"is_host={holds_rendezvous},last_call_timeout=5"
        flags = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d", "--rdzv-id=trial"]
        flags += [f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", f"--rdzv-conf={conf}"]
        command = [sys.executable, "-m", "megatron_moe_lpr.launch", *flags, tmp_path / "worker.py", tmp_path / "up"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen([str(word) for word in command], env=environment))
        return started[-1]

    yield start
    for launcher in started:
        lose(launcher)


def lose(launcher: subprocess.Popen) -> None:
    """Kill a launcher and its workers at once, as a power cut would."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher.pid)
        processes = [process, *process.children(recursive=True)]
        for one in processes:
            one.suspend()
        for one in processes:
            one.kill()
    launcher.wait()


def wait_for_world(directory: Path, size: int) -> None:
    """Wait until all ranks of a world of this size have met; forget it, and worlds before it."""
    files = [directory / f"rank{rank}of{size}" for rank in range(size)]
    deadline = time.monotonic() + SECONDS
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"no world of {size}: {os.listdir(directory)}"
        time.sleep(0.1)
    for file in directory.iterdir():
        file.unlink()


def test_a_run_goes_on_without_a_lost_node_and_takes_it_back_until_one_is_asked_to_stop(node, tmp_path):
    first, second = node(True), node(False)
    wait_for_world(tmp_path / "up", 2)
    lose(second)
    wait_for_world(tmp_path / "up", 1)
    second = node(False)
    wait_for_world(tmp_path / "up", 2)
    second.send_signal(signal.SIGUSR1)
    assert (second.wait(SECONDS), first.wait(SECONDS)) == (EXIT_REQUEUE, EXIT_REQUEUE)


@pytest.mark.parametrize(
    ("codes", "asked", "nodes", "left"),
    [
        ([1], False, 1, 3),  # a failure: torchrun restarts, and counts it
        ([1], False, 2, 3),
        ([-signal.SIGKILL], False, 2, 3),
        ([75, 75], True, 1, 0),  # asked to stop
        ([75], True, 2, 0),
        ([1], True, 2, 0),  # failed while it was asked to stop
        ([75], False, 1, 0),  # its workers were asked to stop by themselves
        ([75], False, 2, 4),  # the launcher of another node was asked, or is gone: not counted
    ],
)
def test_restarts_that_are_left_after_a_failure(codes, asked, nodes, left):
    agent = SimpleNamespace(_remaining_restarts=3, last_code=exit_code(codes, asked))
    Agent._count(agent, asked, nodes)
    assert agent._remaining_restarts == left


def test_no_restart_left_stays_none():
    agent = SimpleNamespace(_remaining_restarts=0, last_code=75)
    Agent._count(agent, False, 2)
    assert agent._remaining_restarts == 0


@pytest.mark.parametrize(
    ("error", "code", "expected", "words"),
    [
        (RendezvousClosedError(), 75, 75, ""),  # another node was asked to stop, and so all have saved
        (RendezvousClosedError(), 3, 3, "another node has ended the run, or an earlier run of this --rdzv-id"),
        (RendezvousClosedError(), 0, 1, "another node has ended the run, or an earlier run of this --rdzv-id"),
        (RendezvousTimeoutError(), 0, 1, "fewer nodes than --nnodes asks for have come in time"),
        (RendezvousConnectionError(), 75, 1, "no connection to the node that holds the rendezvous"),
    ],
)
def test_a_node_that_cannot_meet_the_others_ends_in_one_line(error, code, expected, words, capsys):
    with pytest.raises(SystemExit) as stop:
        end_without_rendezvous(error, "n1:29400", code)
    said = capsys.readouterr().err
    assert stop.value.code == expected and said.count("\n") == bool(words)
    assert said.startswith(f"error: --rdzv-endpoint n1:29400: {words}" if words else "")


def test_every_number_of_nodes_in_a_range_must_fit(tmp_path):
    config = training_config(tmp_path, tmp_path, dict.fromkeys(("el", "hu"), "x"), global_batch_size=8)
    check_node_counts(config, "1:2", 2)
    check_node_counts(config, "3", 2)  # a fixed number: the ranks themselves say what is wrong
    expected = "--nnodes 1:4: torchrun may start on 3 nodes, where --global-batch-size 8 is not a multiple of"
    with pytest.raises(UserError, match=f"{re.escape(expected)}.*numbers of nodes that fit: 1, 2, 4"):
        check_node_counts(config, "1:4", 1)
