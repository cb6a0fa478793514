"""The launcher around torchrun: exit codes, signals passed to workers, checks of its flags."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

from megatron_moe_lpr import launch
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.launch import exit_code, last_lines
from megatron_moe_lpr.launch_checks import check_launch
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
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
        "--max-restarts",  # workers that have saved as they were asked are not started again
        "1",
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
    """The signal arrives while torch is being imported."""
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
    """Otherwise the launcher can end with exit code 1 and `release unlocked lock`."""
    result = subprocess.run(
        [sys.executable, "-c", STARTING], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.split() == ["True", "False"]


def handles(process: int, number: int) -> bool:
    """Return whether a process has a handler for a signal, from /proc."""
    status = Path(f"/proc/{process}/status").read_text()
    mask = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(mask >> (number - 1) & 1)


RESTARTED = """
import os, sys
import torch.distributed as dist
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
initialize_parallel(select_platform("cpu"), ParallelLayout())
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os._exit(int(os.environ["RANK"]))
dist.barrier()
open(sys.argv[1] + os.environ["RANK"], "w").close()
"""


def test_ranks_that_torchrun_restarts_meet_again(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(RESTARTED)
    command = ["-m", "megatron_moe_lpr.launch", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run([sys.executable, *command, script, tmp_path / "done"], cwd=ROOT, timeout=300)
    assert done.returncode == 0 and {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}


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


@contextlib.contextmanager
def taken_port():
    """Yield a port at which another socket listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def run_launcher(tmp_path, *flags):
    """Run the launcher with one worker that does nothing; return its exit code and standard error."""
    (tmp_path / "worker.py").write_text("print('worker')")
    command = [sys.executable, "-m", "megatron_moe_lpr.launch", *map(str, flags), str(tmp_path / "worker.py")]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    return result.returncode, result.stderr


def test_a_taken_master_port_is_one_line(tmp_path):
    with taken_port() as port:
        code, said = run_launcher(tmp_path, "--nproc-per-node", 1, "--master-port", port)
    assert code == 2
    assert said == f"error: --master-port {port}: another program uses this port, perhaps another run; give another\n"


def test_a_port_that_is_taken_after_the_look_is_one_line_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "worker.py").write_text("")
    monkeypatch.setattr(launch, "check_launch", lambda flags: None)
    monkeypatch.setattr(launch, "ForwardedStop", lambda: None)
    monkeypatch.setenv(launch.LAUNCHER, "")
    with taken_port() as port, pytest.raises(SystemExit) as stop:
        launch.main(["--nproc-per-node", "1", "--master-port", str(port), str(tmp_path / "worker.py")])
    assert stop.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"--master-port {port}: " in errors[0] and "already in use" in errors[0]


def test_a_port_of_zero_is_a_free_one(tmp_path):
    assert run_launcher(tmp_path, "--nproc-per-node", 1, "--master-port", 0)[0] == 0


C10D = ("--rdzv-backend=c10d", "--rdzv-endpoint=n1:29400")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--master-port=70000"], "--master-port 70000: must be from 1 to 65535"),
        (["--master-port=-1"], "--master-port -1: must be from 1 to 65535"),
        (["--nnodes=2", "--master-port=0"], "--master-port 0: takes any free port"),
        (["--nproc-per-node=0"], "--nproc-per-node 0: the ranks of a node, 1 or more"),
        (["--nproc-per-node=many"], "--nproc-per-node many: the ranks of a node"),
        (["--nnodes=0"], "--nnodes 0: a number of nodes, 1 or more"),
        (["--nnodes=4:2"], "--nnodes 4:2: a number of nodes"),
        (["--nnodes=2", "--node-rank=2"], "--node-rank 2: the nodes of --nnodes 2 are 0 to 1"),
        (["--node-rank=-1"], "--node-rank -1: the nodes of"),
        (["--max-restarts=-1"], "--max-restarts -1: must be at least 0"),
        (["--nnodes=1:4"], "--nnodes 1:4: the nodes cannot meet again at --master-addr; give --rdzv-backend c10d"),
        (["--nnodes=2", "--max-restarts=1"], "--nnodes 2 with --max-restarts 1: the nodes cannot meet again"),
        (["--nnodes=2", "--rdzv-backend=c10d"], "--rdzv-backend c10d with 2 nodes: give --rdzv-backend c10d"),
        ([*C10D, "--nnodes=1:4"], "--nnodes 1:4: give this launch a name by --rdzv-id"),
        ([*C10D, "--nnodes=2", "--max-restarts=1"], "--nnodes 2 with --max-restarts 1: give this launch a name"),
    ],
)
def test_numbers_of_the_launcher(flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        check_launch(torchrun.get_args_parser().parse_args([*flags, "worker.py"]))


@pytest.mark.parametrize(
    "flags",
    [
        ["--standalone"],
        ["--nproc-per-node=auto"],
        [*C10D, "--rdzv-id=run7", "--nnodes=1:4"],
        [*C10D, "--rdzv-id=run7", "--nnodes=2", "--max-restarts=1"],
        [*C10D, "--nnodes=2"],
        ["--nnodes=2", "--node-rank=1"],
        ["--nnodes=1:1", "--max-restarts=1"],
    ],
)
def test_numbers_that_the_launcher_takes(flags):
    check_launch(torchrun.get_args_parser().parse_args([*flags, "worker.py"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: must be from 1 to 65535"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x: a whole number"),
        ({"RANK": "1"}, "RANK=1: must be below WORLD_SIZE=1"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: a whole number"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ],
)
def test_the_environment_of_another_launcher(changes, words, monkeypatch):
    # Another test of this process may have joined a world.
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    for name, value in (
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | changes
    ).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(words)):
        initialize_parallel(select_platform("cpu"), ParallelLayout())


JOIN = """
from megatron_moe_lpr.errors import run_command
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
run_command(lambda: initialize_parallel(select_platform("cpu"), ParallelLayout()))
"""


def test_a_taken_port_without_torchrun_is_named():
    with taken_port() as port:
        world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = os.environ | world | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", JOIN]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert done.returncode == 1 and f"MASTER_PORT {port}: the ranks cannot meet there" in error
    assert "already in use" in error


def test_a_launcher_may_have_more_connections_than_the_usual_limit(monkeypatch):
    """Two of each rank end in the store of the first node's launcher; the hard limit is respected."""
    limits = []
    monkeypatch.setattr(launch.resource, "setrlimit", lambda kind, pair: limits.append(pair))
    unlimited = launch.resource.RLIM_INFINITY
    for before in ((1024, 4096), (1024, unlimited), (1024, 10**6), (100_000, 10**6), (unlimited, unlimited)):
        monkeypatch.setattr(launch.resource, "getrlimit", lambda kind, before=before: before)
        launch.allow_connections()
    assert limits == [(4096, 4096), (65536, unlimited), (65536, 10**6)]
