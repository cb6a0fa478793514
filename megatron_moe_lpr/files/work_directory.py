"""Hidden directories in which output is built until it is complete, and recovery of those that killed runs left.

WORK/lock      held while the run is alive
WORK/content/  the output
WORK/old/      what the output replaces, during the exchange
"""

import contextlib
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.entry_exchange import (
    CONTENT,
    OLD,
    RECORD,
    finish_exchange,
    is_exchange_complete,
    undo_exchange,
)
from megatron_moe_lpr.files.file_lock import LockedError, file_lock
from megatron_moe_lpr.files.renaming import rename_without_replacing

LOCK = "lock"


@contextlib.contextmanager
def work_directory(path: Path, target: Path) -> Iterator[Path]:
    """Create and lock the hidden directory `path`; it is removed with its content when the block ends.

    Args:
        target: where the output will go. If a killed run left `target` without its old content, that is restored first.

    Raises:
        UserError: another run holds the directory, or may hold it on a file system without locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            _enter(path, stack)
        except LockedError as owner:
            raise UserError(
                f"{target}: another run writes it now ({owner}); wait for it, or choose another place"
            ) from None
        if set(os.listdir(path)) - {LOCK}:
            recover(path, target)
            _print_line(f"note: {path}: left by a run that was killed; removed")
        stack.callback(_recover_at_exit, path, target)
        yield path


@contextlib.contextmanager
def unique_work_directory(parent: Path, name: str) -> Iterator[Path]:
    """Like `work_directory`, with a unique path in `parent`, for outputs that several runs write side by side.

    What killed runs of this `name` left is recovered first, where locks show that these runs have ended.
    """
    recover_killed_runs(parent, name)
    with contextlib.ExitStack() as stack:
        while True:
            path = parent / f".{name}.partial-{secrets.token_hex(4)}"
            # A run that starts at the same moment may hold it for a moment, in `recover_killed_runs`.
            with contextlib.suppress(LockedError):
                _enter(path, stack)
                break
        stack.callback(_recover_at_exit, path, parent)
        yield path


def recover_killed_runs(parent: Path, name: str) -> None:
    """Recover what killed runs left in a `unique_work_directory` of this `name`, and remove it."""
    for path in sorted(parent.glob(f".{glob.escape(name)}.partial-*")):
        with contextlib.suppress(LockedError, OSError), file_lock(path / LOCK) as is_certain:
            if is_certain:
                recover(path, parent)
                _print_line(f"note: {path}: left by a run that was killed; removed")
        _remove_empty(path)


def restore_target(work: Path, target: Path) -> None:
    """Finish or undo an exchange that was begun: `target` has its new content, all of it, or its old content.

    Raises:
        OSError: the old content cannot be put back; `work` keeps it.
    """
    if (work / RECORD).exists():
        if is_exchange_complete(work):
            finish_exchange(work)
        else:
            undo_exchange(work, target)
            _print_line(f"note: {target}: its content was being exchanged; the old one was put back")
    elif (work / OLD).exists() and ((work / CONTENT).exists() or not os.path.lexists(target)):
        # Killed after the first of two renames.
        place = target if not os.path.lexists(target) else free_name(target.with_name(f"{target.name}.old"))
        rename_without_replacing(work / OLD, place)
        _print_line(f"note: {target}: was being replaced; what was there before is at {place}")


def recover(work: Path, target: Path) -> None:
    """`restore_target`, then remove everything in `work` but its lock.

    Raises:
        OSError: the old content cannot be put back; nothing is removed then.
    """
    restore_target(work, target)
    for path in work.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def killed_run_hint(target: Path) -> str:
    """For a message about a missing directory: where its content is, if a run was killed while replacing it."""
    old = target.absolute().with_name(f".{target.name}.partial") / OLD
    return f"; a run was killed while it replaced it, and what was there is in {old}" if old.is_dir() else ""


def free_name(path: Path) -> Path:
    """`path`, with the first number appended that makes it a free name where it is taken."""
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in range(1, 1000))
    return next(name for name in names if not os.path.lexists(name))


def _enter(path: Path, stack: contextlib.ExitStack) -> None:
    stack.callback(_remove_empty, path)
    while True:
        is_new = True
        try:
            path.mkdir()
        except FileExistsError:
            is_new = False
            if path.is_symlink() or not path.is_dir():
                raise UserError(f"{path}: in the way; remove it") from None
        try:
            is_certain = stack.enter_context(file_lock(path / LOCK))
        except FileNotFoundError:  # the run before has just removed it
            continue
        if not is_new and not is_certain:
            raise UserError(
                f"{path}: a killed run left it, or another run works in it now, and this file system has no locks to "
                "tell; remove it if no run does"
            )
        return


def _recover_at_exit(path: Path, target: Path) -> None:
    try:
        recover(path, target)
    except OSError as error:
        _print_line(
            f"warning: {path / OLD}: was at {target} before and cannot be put back ({error}); move it back by hand"
        )
    else:
        if set(os.listdir(path)) - {LOCK}:
            _print_line(f"warning: {path}: cannot be removed whole; remove it by hand")


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
