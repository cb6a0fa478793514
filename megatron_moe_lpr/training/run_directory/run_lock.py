"""One run at a time writes to a --save directory.

SAVE/run.lock names the process of rank 0: host, process number and start, and the SLURM job it belongs to. That process
holds `flock` on the file and sets the file's time anew every few seconds. Whoever finds one decides by these whether
the process can still be alive, and where they don't tell, watches for a while whether the file's time moves. Only its
own successive values are compared: machines' clocks differ.
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
from megatron_moe_lpr.files.filesystem import atomic_file
from megatron_moe_lpr.training.run_directory.lock_file import LockFile, is_locked, last_refreshed
from megatron_moe_lpr.training.run_directory.lock_holder import (
    Holder,
    has_ended,
    has_ended_if_it_rests,
    is_alive,
    is_near,
    this_process,
)

LOCK_FILE = "run.lock"
WATCH_SECONDS = 30.0
"""A lock that was not refreshed for so long, many times `lock_file.REFRESH_SECONDS`, is refreshed by nobody."""


@dataclasses.dataclass(frozen=True)
class RunLock:
    """A lock this process has; a rank that needs none has one without a path."""

    path: Path | None = None
    holder: Holder | None = None
    file: LockFile | None = None

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
        if self.file is not None:
            self.file.close()


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
    path, asking, ended = save / LOCK_FILE, this_process(), None
    while True:
        with _alone_in(save):
            holder = read_lock(path)
            if holder is None or holder == ended:
                return _take(path, asking, holder)
        # Outside the block: it may take a while, and its result holds for this holder only.
        _check_free(path, holder, asking, take_over)
        ended = holder


def _take(path: Path, asking: Holder, before: Holder | None) -> RunLock:
    if before is not None:
        print(f"{path}: taken over from {before}", file=sys.stderr, flush=True)
    with atomic_file(path) as partial:
        file = LockFile(partial)
        mine = dataclasses.replace(asking, flock=file.flock, refreshed=file.refreshed)
        file.write(f"{json.dumps(dataclasses.asdict(mine))}\n".encode())
    file.start_refreshing()
    return RunLock(path, mine, file)


def _check_free(path: Path, holder: Holder, asking: Holder, take_over: bool) -> None:
    locked = is_locked(path)
    if has_ended(holder, asking, locked):
        return
    alive = is_alive(holder, asking, locked)
    if not alive and holder.refreshed and (take_over or is_near(holder, asking)):
        alive = _is_refreshed(path, holder)
        locked = is_locked(path)
    if alive:
        raise UserError(f"--save {path.parent}: {holder} writes there; wait for its end, or choose another directory")
    if not take_over and not has_ended_if_it_rests(holder, asking, locked):
        raise UserError(
            f"--save {path.parent}: {holder} may still write there, which cannot be seen from {asking.host}; "
            "make sure that it has ended, then pass --take-over"
        )


def _is_refreshed(path: Path, holder: Holder) -> bool:
    """Watch whether somebody refreshes the lock."""
    print(f"{path}: waiting {WATCH_SECONDS:.0f} s to see whether {holder} is alive", file=sys.stderr, flush=True)
    before, end = last_refreshed(path), time.monotonic() + WATCH_SECONDS
    while (now := last_refreshed(path)) == before and time.monotonic() < end:
        time.sleep(min(1.0, WATCH_SECONDS / 10))
    return now is not None and now != before


def read_lock(path: Path) -> Holder | None:
    """Who has the lock; None: nobody.

    Raises:
        UserError: something else lies there.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        # A later version may write more.
        return Holder(
            **{field.name: fields[field.name] for field in dataclasses.fields(Holder) if field.name in fields}
        )
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
