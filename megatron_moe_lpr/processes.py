"""Processes that don't outlive the one that started them, and a name for a process that no other ever has."""

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
"""What a batch system sends to ask for an end."""

PR_SET_PDEATHSIG = 1
"""<linux/prctl.h>"""
POLL_SECONDS = 1.0


def end_with_parent(
    number: signal.Signals = signal.SIGKILL, parent: int | None = None, grace: float | None = None
) -> None:
    """Let this process get `number` when its parent ends, however that ends. Call it first thing in a child.

    On Linux the kernel sends the signal, so it also reaches a process that hangs in a collective or a system call.
    It sends it when the *thread* that forked this process ends: start children from the main thread, or from one that
    lives as long as they shall. Elsewhere a thread looks at the parent's number every second. Children of this process
    don't inherit it: each calls this function itself.

    Args:
        number: SIGKILL for what holds nothing worth finishing.
        parent: process number of the parent, as the parent knows it; where it is another one by now, this process gets
            the signal at once. Default: what multiprocessing says, else whatever is the parent now.
        grace: seconds that a gentler signal leaves this process; then SIGKILL.
    """
    if parent is None:
        started_by = multiprocessing.parent_process()
        parent = (started_by.pid if started_by else None) or os.getppid()
    watched = _ask_kernel(number)
    # The parent may have ended before the kernel was asked; then there is nobody left whose end would be told.
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
    if not watched or grace is not None:
        poll = functools.partial(_poll_parent, parent, None if watched else number, grace)
        start_thread(poll, f"the watch for the end of process {parent} (this process may outlive it)")


def start_thread(target: Callable[[], object], purpose: str, daemon: bool = True) -> threading.Thread | None:
    """Start a thread; where the machine gives none, warn on standard error with its reason.

    Args:
        purpose: what goes without it, for the warning.

    Returns:
        The thread that runs, or None: the caller does the work itself, or leaves it out.
    """
    thread = threading.Thread(target=target, daemon=daemon)
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        with contextlib.suppress(OSError, ValueError):
            print(f"warning: no thread for {purpose}: {error}; raise `ulimit -u`", file=sys.stderr, flush=True)
        return None
    return thread


def _ask_kernel(number: signal.Signals) -> bool:
    """Whether the kernel will send the signal: Linux only."""
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
    """Processes and threads that are started inside the block never get these signals; this one gets them after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_running(process: int) -> bool:
    """Whether a process of this number runs on this machine, also where /proc hides it (`hidepid`, other users').

    A number is used again after its process has ended: see `start_time`.
    """
    if process < 1:  # kill would mean a group of processes
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return not _is_zombie(process)


def start_time(process: int) -> float | None:
    """When a process of this machine started, in a unit of the machine's own; None: it has ended, or is hidden.

    A number is used again after its process has ended. Number and start together are one process only. On Linux the
    start is in clock ticks since boot, which, unlike the time of day, nobody adjusts.
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
    """/proc/PID/stat from the state on; None: no such process, or one that this user may not see."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
