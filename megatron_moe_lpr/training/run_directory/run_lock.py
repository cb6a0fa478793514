"""The lock by which only one run at a time writes to a --save directory.

SAVE/run.lock names the process of rank 0: host, process number and start, and its SLURM job. That process holds `flock`
on the file and refreshes the file's time every few seconds. A run that finds a lock decides from these whether the
process may still be alive; if they don't decide it, it watches for a while whether the file's time changes. A time is
compared only with earlier times of the same file, since machines' clocks differ.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.atomic_file import atomic_file
from megatron_moe_lpr.training.run_directory.lock_file import LockFile, is_locked, last_refreshed
from megatron_moe_lpr.training.run_directory.lock_holder import (
    Holder,
    has_ended,
    has_ended_if_not_refreshed,
    is_alive,
    is_near,
    is_same_launch,
    this_process,
)

LOCK_FILE = "run.lock"
WATCH_SECONDS = 30.0
"""A lock that is not refreshed for so long (many times `lock_file.REFRESH_SECONDS`) has no living process."""


@dataclasses.dataclass(frozen=True)
class RunLock:
    """A lock that this process holds. Only rank 0 needs one: other ranks have a RunLock without a path."""

    path: Path | None = None
    holder: Holder | None = None
    file: LockFile | None = None

    def check(self) -> None:
        """Check that this process still holds the lock, before it writes to the directory.

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
        """Remove the lock file, if this process still holds the lock."""
        if self.path is not None and read_lock(self.path) == self.holder:
            self.path.unlink(missing_ok=True)
        if self.file is not None:
            self.file.close()


@contextlib.contextmanager
def run_lock(save: Path, take_over: bool = False) -> Iterator[RunLock]:
    """Hold the lock of `save` inside the block, on rank 0 for all ranks.

    Args:
        save: the run's directory, created where it is missing.
        take_over: take the lock from a run on another host that may still be alive (--take-over).

    Raises:
        UserError: another run holds the lock, or may hold it.
    """
    is_new = not os.path.lexists(save)
    lock = RunLock() if int(os.environ.get("RANK", 0)) else acquire(save, take_over)
    try:
        yield lock
    finally:
        lock.release()
        if is_new:
            # A start that was refused before it wrote anything leaves no directory; one with files stays.
            with contextlib.suppress(OSError):
                save.rmdir()


def acquire(save: Path, take_over: bool = False) -> RunLock:
    """Lock `save`, also where a run that has ended left its lock; arguments and errors: see `run_lock`."""
    save.mkdir(parents=True, exist_ok=True)
    path, observer, ended = save / LOCK_FILE, this_process(), None
    while True:
        with _alone_in(save):
            holder = read_lock(path)
            if holder is None or holder == ended:
                return _take(path, observer, holder)
        # Outside of the block, since it may take a while; the result is valid for this holder only.
        _check_free(path, holder, observer, take_over)
        ended = holder


def _take(path: Path, observer: Holder, before: Holder | None) -> RunLock:
    if before is not None:
        print(f"{path}: taken over from {before}", file=sys.stderr, flush=True)
    with atomic_file(path) as partial:
        file = LockFile(partial)
        mine = dataclasses.replace(observer, flock=file.flock, refreshed=file.refreshed)
        file.write(f"{json.dumps(dataclasses.asdict(mine))}\n".encode())
    file.start_refreshing()
    return RunLock(path, mine, file)


def _check_free(path: Path, holder: Holder, observer: Holder, take_over: bool) -> None:
    locked = is_locked(path)
    if has_ended(holder, observer, locked):
        return
    alive = is_alive(holder, observer, locked)
    watched = take_over or is_near(holder, observer) or is_same_launch(holder, observer)
    if not alive and holder.refreshed and watched:
        alive = _is_refreshed(path, holder)
        locked = is_locked(path)
    if alive:
        raise UserError(f"--save {path.parent}: {holder} writes there; wait for its end, or choose another directory")
    if not take_over and not has_ended_if_not_refreshed(holder, observer, locked):
        raise UserError(
            f"--save {path.parent}: {holder} may still write there, which cannot be seen from {observer.host}; "
            "make sure that it has ended, then pass --take-over"
        )


def _is_refreshed(path: Path, holder: Holder) -> bool:
    """Watch for WATCH_SECONDS whether a process refreshes the lock."""
    print(f"{path}: waiting {WATCH_SECONDS:.0f} s to see whether {holder} is alive", file=sys.stderr, flush=True)
    before, end = last_refreshed(path), time.monotonic() + WATCH_SECONDS
    while (now := last_refreshed(path)) == before and time.monotonic() < end:
        time.sleep(min(1.0, WATCH_SECONDS / 10))
    return now is not None and now != before


def read_lock(path: Path) -> Holder | None:
    """Read which process holds the lock; None: there is no lock file.

    Raises:
        UserError: the file is not a lock of this program.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        # A later version may write further fields.
        return Holder(
            **{field.name: fields[field.name] for field in dataclasses.fields(Holder) if field.name in fields}
        )
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UserError(f"{path}: not a lock of this program; remove it if no run writes to {path.parent}") from None


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Let only one process at a time read and replace the lock file, where the file system supports `flock`.

    Where it does not, two runs that start together may both take the lock; the one whose file was replaced stops in
    `RunLock.check`.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
