"""Which checkpoints of a run are kept, and removing the others without disturbing who reads them."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_moe_lpr.checkpoint.format.directory import is_iteration_directory, iteration_of
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.processes import start_thread

REMOVED_SUFFIX = ".removed"
LOCKED_FILE = "metadata.json"
"""Readers hold a shared lock (flock) on this file, and who removes the directory an exclusive one."""
KEEP_LAST = 2
"""With --save-retain-interval alone: the latest, and one to fall back to where that is damaged."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """What is kept when a newer checkpoint is complete; by default everything."""

    interval: int | None = None
    """Keep the checkpoints of every so many steps for good."""
    last: int | None = None
    """Keep this many of the newest."""

    def check(self, save_interval: int | None) -> None:
        """Refuse what would keep too little or nothing.

        Raises:
            UserError: naming the flag.
        """
        if self.last is not None and self.last < 1:
            raise UserError(f"--keep-last-checkpoints {self.last}: at least 1, the newest, is always kept")
        if self.interval is None:
            return
        if self.interval < 1:
            raise UserError(f"--save-retain-interval {self.interval}: must be at least 1 step")
        if not save_interval or self.interval % save_interval:
            raise UserError(
                f"--save-retain-interval {self.interval}: must be a multiple of --save-interval "
                f"({save_interval or 'not given'}), or no checkpoint would ever be one to retain"
            )

    def superfluous(self, iterations: Collection[int], newest: int) -> list[int]:
        """Those of the iterations that may go now that `newest` is complete, oldest first."""
        if self.interval is None and self.last is None:
            return []
        older = sorted(iteration for iteration in iterations if iteration < newest)
        count = (self.last or KEEP_LAST) - 1
        candidates = older[:-count] if count else older
        return [iteration for iteration in candidates if self.interval is None or iteration % self.interval]


class RemovedCheckpoint(UserError):
    """The run that wrote a checkpoint has removed or replaced it."""


@contextlib.contextmanager
def being_read(directory: Path, to_the_end: bool = False) -> Iterator[None]:
    """While the block runs, no run removes this iteration directory (where its file system knows locks).

    Args:
        to_the_end: at the end of the block, check that the same directory is still there: a run that repeats its steps
            puts a new checkpoint of the same step in its place, whoever reads.

    Raises:
        RemovedCheckpoint: it was removed before the lock was there, or replaced while it was read.
    """
    try:
        stream = open(directory / LOCKED_FILE, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        raise _vanished(directory) from None
    with stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_SH)
        if not (is_iteration_directory(directory) and _is_in_place(stream, directory)):
            raise _vanished(directory)
        yield
        if to_the_end and not _is_in_place(stream, directory):
            raise RemovedCheckpoint(f"{directory}: was replaced while it was read; start again")


def _is_in_place(stream: BinaryIO, directory: Path) -> bool:
    """Whether an open `LOCKED_FILE` is the one that lies in the directory now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(directory / LOCKED_FILE))
    return False


def _vanished(directory: Path) -> RemovedCheckpoint:
    return RemovedCheckpoint(
        f"{directory}: was removed by the run that wrote it (--keep-last-checkpoints, --save-retain-interval); "
        "name a newer checkpoint"
    )


def remove_superfluous(root: Path, newest: int, retention: Retention, kept: Collection[Path] = ()) -> list[str]:
    """Remove what `retention` does not keep. Only for who owns the directory, on one rank.

    A directory is first renamed to a hidden name, so that no half of it ever looks like a checkpoint, then deleted
    by a thread.

    Args:
        newest: the iteration whose checkpoint has just been completed.
        kept: iteration directories that stay whatever the rule says.

    Returns:
        A line for each that could not be removed and why; one that is being read goes the next time.
    """
    stay = {path.resolve() for path in kept}
    present = {iteration_of(path): path for path in Path(root).glob("iter_*") if is_iteration_directory(path)}
    notes = []
    for iteration in retention.superfluous([number for number in present if number is not None], newest):
        path = present[iteration]
        if path.resolve() in stay:
            continue
        try:
            hide(path)
        except OSError as error:
            busy = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            notes.append(f"{path}: kept, {'it is being read' if busy else f'it cannot be removed ({error.strerror})'}")
    if start_thread(lambda: remove_hidden(root), "the removal of old checkpoints", daemon=False) is None:
        remove_hidden(root)
    return notes


def hide(path: Path) -> None:
    """Rename an iteration directory so that it is none any more.

    Raises:
        OSError: it is being read, or cannot be locked or renamed.
    """
    with open(path / LOCKED_FILE, "r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        target = path.with_name(f".{path.name}{REMOVED_SUFFIX}")
        shutil.rmtree(target, ignore_errors=True)
        os.rename(path, target)


def remove_hidden(root: Path) -> None:
    """Delete what was hidden, also by a run that was killed before it could."""
    for path in Path(root).glob(f".iter_*{REMOVED_SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)
