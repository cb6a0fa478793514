"""The process that holds the lock of a --save directory, and whether another process can tell that it is alive."""

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
    """Boot id of the host, new with each boot and unique to the machine. Empty: not known."""
    namespace: str
    """PID namespace in which `process` counts: a container may have its own. Empty: not known."""
    process: int
    start: float
    """See `processes.start_time`."""
    since: str
    """Date and time of its start, for messages."""
    job: str | None = None
    """SLURM's job number, the same for all starts of a job that is requeued."""
    restart: int = 0
    """How often SLURM has restarted that job."""
    cluster: str | None = None
    """SLURM's name of the cluster: two clusters may share a file system and use the same job numbers."""
    launch: str | None = None
    """torchrun's --rdzv-id, where it names one launch of several nodes."""
    flock: bool = False
    """Whether the process holds `flock` on the lock file, which the kernel releases when the process ends."""
    refreshed: bool = False
    """Whether the process refreshes the lock file's time every few seconds."""

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host}, started {self.since}{job}"


def this_process() -> Holder:
    """Describe this process as a holder of a lock."""
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
        launch=_launch(os.environ.get("TORCHELASTIC_RUN_ID")),
        refreshed=True,
    )


def has_ended(holder: Holder, observer: Holder, is_locked: bool | None = None) -> bool:
    """Whether `holder` has certainly ended, as far as the process `observer` can know.

    In the same boot and PID namespace it has if no process has its number, or if that process started at another time.
    A process that /proc does not show may be another user's (`hidepid`), so that its end is not certain. The observer
    may also be a later start of the same SLURM job: SLURM has ended the earlier start, or given up its node.

    Args:
        is_locked: see `is_alive`.
    """
    if holder.job and holder.job == observer.job and observer.restart > holder.restart:
        return holder.cluster is None or observer.cluster is None or holder.cluster == observer.cluster
    if not _sees_processes_of(holder, observer) or (holder.flock and is_locked):
        return False
    start = start_time(holder.process)
    return not is_running(holder.process) or (start is not None and start != holder.start)


def is_alive(holder: Holder, observer: Holder, is_locked: bool | None) -> bool:
    """Whether `holder` certainly runs, as far as the process `observer` can know.

    Args:
        is_locked: whether some process holds `flock` on the lock file; None: not known. Used for holders in the same
            boot only: a file server may keep the lock of a machine that is gone.
    """
    if _same_boot(holder, observer) and holder.flock and is_locked:
        return True
    return _sees_processes_of(holder, observer) and start_time(holder.process) == holder.start


def has_ended_if_not_refreshed(holder: Holder, observer: Holder, is_locked: bool | None) -> bool:
    """Whether `holder` has ended if its lock file is not refreshed any more.

    In the same boot: yes, where nobody holds its `flock` (a process of another user or container, which is not
    visible). In another boot with the same host name: yes, since the host has rebooted, or another machine of that name
    (cloned image, container) would keep refreshing. With another host name: no, that host may have lost the file
    system; yes in the same launch of torchrun, whose rendezvous has given up the node.
    """
    if not holder.refreshed:
        return False
    if not is_near(holder, observer) and is_same_launch(holder, observer):
        return True  # a file server may keep the `flock` of a machine that is gone
    if is_locked:
        return False
    if _same_boot(holder, observer):
        return holder.flock and is_locked is False
    return is_near(holder, observer)


def is_near(holder: Holder, observer: Holder) -> bool:
    """Whether both have the same host name: one machine, its containers, or another machine of that name."""
    return holder.host == observer.host


def is_same_launch(holder: Holder, observer: Holder) -> bool:
    """Whether torchrun started both in one launch of several nodes, where a later start follows the end of a node."""
    return holder.launch is not None and holder.launch == observer.launch


def _launch(run_id: str | None) -> str | None:
    return None if run_id in (None, "", "none") else run_id  # "none": torchrun's default, the same for all launches


def _same_boot(holder: Holder, observer: Holder) -> bool:
    return is_near(holder, observer) and bool(observer.boot) and holder.boot == observer.boot


def _sees_processes_of(holder: Holder, observer: Holder) -> bool:
    return _same_boot(holder, observer) and bool(observer.namespace) and holder.namespace == observer.namespace


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
