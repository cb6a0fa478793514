"""One run at a time writes to a --save directory.

SAVE/run.lock names the process of rank 0: host, process number and start, and the SLURM job it belongs to. Whoever
finds one decides by it alone whether that process can still be alive.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.filesystem import atomic_file
from megatron_moe_lpr.processes import start_time

LOCK_FILE = "run.lock"


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that writes to a --save directory."""

    host: str
    boot: str
    """Of the host: it changes with each boot."""
    namespace: str
    """In which process numbers count: a container may have its own."""
    process: int
    start: float
    """See `processes.start_time`."""
    since: str
    """Date and time, for people."""
    job: str | None = None
    """SLURM's number, the same for all starts of a job that is requeued."""
    restart: int = 0
    """How often SLURM has started that job before."""

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host}, started {self.since}{job}"


def this_process() -> Holder:
    """Who is asking."""
    return Holder(
        host=socket.gethostname(),
        boot=_read_text("/proc/sys/kernel/random/boot_id"),
        namespace=_link("/proc/self/ns/pid"),
        process=os.getpid(),
        start=start_time(os.getpid()) or 0.0,
        since=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        job=os.environ.get("SLURM_JOB_ID"),
        restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    )


def has_ended(holder: Holder, asking: Holder) -> bool:
    """Whether `holder` has certainly ended, seen from the process `asking`.

    On the same host: its process is gone, or the number belongs to another one by now, or the host was booted since.
    A later start of the same SLURM job: SLURM has ended the earlier one, or given up the node it was on.
    """
    if holder.job and holder.job == asking.job and asking.restart > holder.restart:
        return True
    if holder.host != asking.host:
        return False
    if holder.boot != asking.boot:
        return True
    return holder.namespace == asking.namespace and start_time(holder.process) != holder.start


@dataclasses.dataclass(frozen=True)
class RunLock:
    """A lock this process has; a rank that needs none has one without a path."""

    path: Path | None = None
    holder: Holder | None = None

    def check(self) -> None:
        """Before anything is written.

        Raises:
            UserError: another run has taken the directory over.
        """
        if self.path is None:
            return
        found = read_lock(self.path)
        if found != self.holder:
            by = str(found) if found else "somebody who removed the lock"
            raise UserError(f"{self.path}: taken over by {by}; this run stops and writes nothing more")

    def release(self) -> None:
        """Remove it, if it still is this process's."""
        if self.path is not None and read_lock(self.path) == self.holder:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def run_lock(save: Path, take_over: bool = False) -> Iterator[RunLock]:
    """Hold the lock of `save` inside the block, on rank 0 for all ranks.

    Raises:
        UserError: another run has it, or may have it.
    """
    lock = RunLock() if int(os.environ.get("RANK", 0)) else acquire(save, take_over)
    try:
        yield lock
    finally:
        lock.release()


def acquire(save: Path, take_over: bool = False) -> RunLock:
    """Take the lock of `save`, or that of a run that has ended. See `run_lock`."""
    save.mkdir(parents=True, exist_ok=True)
    path, asking = save / LOCK_FILE, this_process()
    with _alone_in(save):
        holder = read_lock(path)
        if holder is not None:
            _check_free(path, holder, asking, take_over)
            print(f"{path}: taken over from {holder}", file=sys.stderr, flush=True)
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(asking)) + "\n", encoding="utf-8")
    return RunLock(path, asking)


def _check_free(path: Path, holder: Holder, asking: Holder, take_over: bool) -> None:
    if has_ended(holder, asking):
        return
    here = (holder.host, holder.boot, holder.namespace) == (asking.host, asking.boot, asking.namespace)
    if here:
        raise UserError(f"--save {path.parent}: {holder} writes there; wait for its end, or choose another directory")
    if not take_over:
        raise UserError(
            f"--save {path.parent}: {holder} may still write there, which cannot be seen from {asking.host}; "
            "make sure that it has ended, then pass --take-over"
        )


def read_lock(path: Path) -> Holder | None:
    """Who has the lock; None: nobody.

    Raises:
        UserError: something else lies there.
    """
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UserError(f"{path}: not a lock of this program; remove it if no run writes to {path.parent}") from None


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Two runs that start together look one after the other, where the file system has locks.

    Where it has none both may think the directory theirs: whose file was replaced stops in `RunLock.check`.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
