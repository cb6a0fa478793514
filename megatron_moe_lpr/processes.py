"""Child processes that end with their parent, threads that may fail to start, and identity of a process."""

import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import psutil

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals by which a batch system asks a job to end."""

PR_SET_PDEATHSIG = 1
"""Constant of <linux/prctl.h>."""
POLL_SECONDS = 1.0


def end_with_parent(
    number: signal.Signals = signal.SIGKILL, parent: int | None = None, grace: float | None = None
) -> None:
    """Let this process get the signal `number` when its parent ends in any way. Call it first in a child process.

    On Linux the kernel sends the signal, so it also reaches a process that hangs in a collective or a system call.
    It sends it when the *thread* that forked this process ends: start children from the main thread, or from a thread
    that lives as long as they must. On other systems a thread checks the parent's number every second. Children of
    this process do not inherit this: each calls the function itself.

    Args:
        number: the signal; SIGKILL for a process that has nothing to finish.
        parent: process number of the parent, as the parent knows it; if the parent has already changed, this process
            gets the signal at once. Default: the parent that multiprocessing reports, else the current one.
        grace: seconds from a gentler signal to SIGKILL; None: no SIGKILL.
    """
    if parent is None:
        started_by = multiprocessing.parent_process()
        parent = (started_by.pid if started_by else None) or os.getppid()
    watched = _request_death_signal(number)
    # If the parent ended before prctl was called, the kernel will never send the signal.
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
    if not watched or grace is not None:
        poll = functools.partial(_poll_parent, parent, None if watched else number, grace)
        start_thread(poll, f"the watch for the end of process {parent} (this process may outlive it)")


def start_thread(target: Callable[[], object], purpose: str, daemon: bool = True) -> threading.Thread | None:
    """Start a thread; if the system refuses one, warn on standard error with the reason.

    Args:
        target: function that the thread runs.
        purpose: the work that the thread does, for the warning.
        daemon: whether the process may end while the thread runs.

    Returns:
        The running thread, or None: the caller does the work itself, or leaves it out.
    """
    thread = threading.Thread(target=target, daemon=daemon)
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        with contextlib.suppress(OSError, ValueError):
            print(f"warning: no thread for {purpose}: {error}; raise `ulimit -u`", file=sys.stderr, flush=True)
        return None
    return thread


def _request_death_signal(number: signal.Signals) -> bool:
    """Return whether the kernel will send the signal at the parent's end: on Linux only."""
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) == 0


def _poll_parent(parent: int, number: signal.Signals | None, grace: float | None) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    if number is not None:
        os.kill(os.getpid(), number)
    if grace is not None:
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def shielded_from(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Block these signals in processes and threads started inside the block; this one gets them after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_running(process: int) -> bool:
    """Return whether a process of this number runs on this machine, also if /proc hides it (`hidepid`, other users).

    A number is reused after its process has ended: see `start_time`.
    """
    if process < 1:  # os.kill would signal a process group
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it belongs to another user
    return not _is_zombie(process)


def start_time(process: int) -> float | None:
    """Return when a process of this machine started, to tell apart processes of one number; None: ended, or hidden.

    A number is reused after its process has ended; number and start time together name one process. On Linux the unit
    is clock ticks since boot, which nobody adjusts, unlike the time of day; elsewhere seconds since 1970.
    """
    if sys.platform == "linux":
        fields = _stat_fields(process)
        return None if fields is None or fields[0] in "ZX" else float(fields[19])
    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else found.create_time()
    except psutil.Error:
        return None


def _is_zombie(process: int) -> bool:
    if sys.platform == "linux":
        fields = _stat_fields(process)
        return fields is not None and fields[0] in "ZX"
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _stat_fields(process: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; None: no such process, or this user may not see it."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
