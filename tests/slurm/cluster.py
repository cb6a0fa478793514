"""A real SLURM cluster of two nodes on this one machine: munged, slurmctld and two slurmd on loopback ports.

Debian's packages slurm-wlm and munge are started as root with their own configuration, which does not affect a cluster
that the machine itself belongs to.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.distributed import free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
NODES = ("n1", "n2")
START_SECONDS = 60
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY")
DAEMON = "TEST_DAEMON"
"""Environment variable that says which daemon started a process."""

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/linear
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=20
KillWait=5
MinJobAge=3600
ReturnToService=2
JobRequeue=1
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN\n"


def missing_programs() -> list[str]:
    """Return the programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]


class Cluster:
    """A running cluster; `stop` ends it and every job in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(directory / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}
        directory.chmod(0o755)
        (directory / "state").mkdir()
        for node in NODES:
            (directory / f"spool-{node}").mkdir()
        self._configure()
        self._start_munge()
        self._start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self._wait_for_nodes()

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        ports = [free_port() for _ in range(1 + len(NODES))]
        text = CONFIGURATION.format(host=host, directory=self.directory, controller_port=ports[0])
        for name, port in zip(NODES, ports[1:], strict=True):
            text += NODE.format(name=name, host=host, port=port, cpus=os.cpu_count())
        text += f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP\n"
        (self.directory / "slurm.conf").write_text(text)

    def _start_munge(self) -> None:
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        flags = [f"--{flag}={self.directory / name}" for flag, name in (*files.items(), ("seed-file", "munge.seed"))]
        self._start("munged", "munged", "--foreground", "--force", *flags)
        wait_until(lambda: (self.directory / "munge.socket").exists(), "munged did not start")

    def _start(self, name: str, *command: str) -> None:
        environment = {**self.environment, DAEMON: name}
        with (self.directory / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd and everything that runs on the node, as a power cut would, and tell the controller,
        which would find out by itself after half a minute."""
        slurmd = self.daemons.pop(node)
        slurmd.kill()
        slurmd.wait()
        self._kill_steps(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed by the test")

    def _kill_steps(self, node: str) -> None:
        """Kill the processes that the node's slurmd has started, found by their environment."""
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in environment
            on_node = f"SLURMD_NODENAME={node}".encode() in environment or f"{DAEMON}={node}".encode() in environment
            if ours and on_node and int(process.name) != getattr(self.daemons.get(node), "pid", None):
                _kill(int(process.name))

    def run(self, *command: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Run one of SLURM's commands and return its output."""
        environment = environment or self.environment
        result = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return the fields that `scontrol show job` prints."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, state: str, seconds: float) -> None:
        """Wait until a job is in a state; fail at once if it ends in another."""

        def reached() -> bool:
            now = self.job(job)["JobState"]
            assert now == state or now not in ENDS, f"job {job}: {now} instead of {state}"
            return now == state

        wait_until(reached, lambda: f"{self.job(job)}", seconds)

    def _wait_for_nodes(self) -> None:
        def idle() -> bool:
            result = subprocess.run(
                ["sinfo", "-h", "-o", "%T %D"], env=self.environment, capture_output=True, text=True
            )
            return result.stdout.strip() == f"idle {len(NODES)}"

        wait_until(idle, lambda: (self.directory / "slurmctld.log").read_text()[-2000:])

    def stop(self) -> None:
        """End all jobs and daemons."""
        subprocess.run(["scancel", "--user=root", "--state=PENDING"], env=self.environment, timeout=30)
        for node in NODES:
            self._kill_steps(node)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def wait_until(condition: Callable[[], bool], message: str | Callable[[], str], seconds: float = START_SECONDS) -> None:
    """Wait for a condition; fail with the message after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message() if callable(message) else message
        time.sleep(0.3)


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
