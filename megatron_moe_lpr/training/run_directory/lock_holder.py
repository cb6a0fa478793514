"""The process that holds the lock of a --save directory, and what can be known of it from elsewhere."""

import dataclasses
import datetime
import os
import socket
import sys
from pathlib import Path

import psutil

from megatron_moe_lpr.processes import is_running, start_time


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that writes to a --save directory."""

    host: str
    boot: str
    """Of the host: it changes with each boot, and no two machines share it. Empty: not known."""
    namespace: str
    """In which process numbers count: a container may have its own. Empty: not known."""
    process: int
    start: float
    """See `processes.start_time`."""
    since: str
    """Date and time, for people."""
    job: str | None = None
    """SLURM's number, the same for all starts of a job that is requeued."""
    restart: int = 0
    """How often SLURM has started that job before."""
    cluster: str | None = None
    """SLURM's name of the cluster: two of them may share a file system, and count their jobs alike."""
    flock: bool = False
    """Whether the process holds `flock` on the lock file, which the kernel releases when the process ends."""
    refreshed: bool = False
    """Whether the process sets the lock file's time anew every few seconds."""

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host}, started {self.since}{job}"


def this_process() -> Holder:
    """Who is asking."""
    linux = sys.platform == "linux"
    return Holder(
        host=socket.gethostname(),
        boot=_read_text("/proc/sys/kernel/random/boot_id") if linux else f"{psutil.boot_time():.0f}",
        namespace=_link("/proc/self/ns/pid") if linux else "the only one",
        process=os.getpid(),
        start=start_time(os.getpid()) or 0.0,
        since=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        job=os.environ.get("SLURM_JOB_ID"),
        restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        cluster=os.environ.get("SLURM_CLUSTER_NAME"),
        refreshed=True,
    )


def has_ended(holder: Holder, asking: Holder, is_locked: bool | None = None) -> bool:
    """Whether `holder` has certainly ended, seen from the process `asking`. `is_locked`: see `is_alive`.

    On the same boot of one machine, where both see the same processes: there is no process of its number, or one that
    started at another time. A process that /proc does not show may be another user's (`hidepid`): not certain.

    A later start of the same SLURM job: SLURM has ended the earlier one, or given up the node it was on.
    """
    if holder.job and holder.job == asking.job and asking.restart > holder.restart:
        return holder.cluster is None or asking.cluster is None or holder.cluster == asking.cluster
    if not _sees_processes_of(holder, asking) or (holder.flock and is_locked):
        return False
    start = start_time(holder.process)
    return not is_running(holder.process) or (start is not None and start != holder.start)


def is_alive(holder: Holder, asking: Holder, is_locked: bool | None) -> bool:
    """Whether `holder` certainly runs, seen from the process `asking`.

    Args:
        is_locked: whether some process has `flock` on the lock file; None: the file system does not tell. It counts on
            the same boot only: a server may keep the lock of a machine that is gone.
    """
    if _same_boot(holder, asking) and holder.flock and is_locked:
        return True
    return _sees_processes_of(holder, asking) and start_time(holder.process) == holder.start


def has_ended_if_it_rests(holder: Holder, asking: Holder, is_locked: bool | None) -> bool:
    """Whether a lock file that `holder` does not refresh any more means that it has ended.

    On the same boot that holds of a process which cannot be seen (another user's, another container's) where nobody
    has its `flock`; on another boot, of the same host name: the host was booted since, or it is another machine of that
    name (cloned images, containers), whose run would go on refreshing its lock. Of another host name: no. It may be cut
    off from the file system.
    """
    if not holder.refreshed or is_locked:
        return False
    if _same_boot(holder, asking):
        return holder.flock and is_locked is False
    return is_near(holder, asking)


def is_near(holder: Holder, asking: Holder) -> bool:
    """Whether both have one host name: the same machine, its container, or another machine of that name."""
    return holder.host == asking.host


def _same_boot(holder: Holder, asking: Holder) -> bool:
    return is_near(holder, asking) and bool(asking.boot) and holder.boot == asking.boot


def _sees_processes_of(holder: Holder, asking: Holder) -> bool:
    return _same_boot(holder, asking) and bool(asking.namespace) and holder.namespace == asking.namespace


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
