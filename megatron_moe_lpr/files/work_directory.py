"""A hidden directory in which output grows until it is complete; what a killed run left in one is put in order.

WORK/lock      held while the run lives
WORK/content/  the output
WORK/old/      what it replaces, while the two change places
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
from megatron_moe_lpr.files.file_lock import LockedError, file_lock
from megatron_moe_lpr.files.moving_in import CONTENT, OLD, RECORD, forget, is_complete, put_back
from megatron_moe_lpr.files.renaming import rename_without_replacing

LOCK = "lock"


@contextlib.contextmanager
def work_directory(path: Path, target: Path) -> Iterator[Path]:
    """Hold the hidden directory `path` until the block ends; it is gone then, and so is all that is in it.

    Args:
        target: what the output is for. If a killed run left it without its old content, that is put back first.

    Raises:
        UserError: another run is in such a block, or may be and the file system has no locks to tell.
    """
    with contextlib.ExitStack() as stack:
        try:
            _enter(path, stack)
        except LockedError as owner:
            raise UserError(
                f"{target}: another run writes it now ({owner}); wait for it, or choose another place"
            ) from None
        if set(os.listdir(path)) - {LOCK}:
            settle(path, target)
            _say(f"note: {path}: left by a run that was killed; removed")
        stack.callback(_settle_at_the_end, path, target)
        yield path


@contextlib.contextmanager
def unique_work_directory(parent: Path, name: str) -> Iterator[Path]:
    """As `work_directory`, in `parent`, for output that several runs may write side by side under names of their own.

    What killed runs with this `name` left is put in order, where the file system's locks show that they have ended.
    """
    clear_left(parent, name)
    with contextlib.ExitStack() as stack:
        while True:
            path = parent / f".{name}.partial-{secrets.token_hex(4)}"
            # A run that starts at the same moment may hold it while it finds out that nothing was left.
            with contextlib.suppress(LockedError):
                _enter(path, stack)
                break
        stack.callback(_settle_at_the_end, path, parent)
        yield path


def clear_left(parent: Path, name: str) -> None:
    """Put in order what killed runs left of their `unique_work_directory` of this `name`."""
    for path in sorted(parent.glob(f".{glob.escape(name)}.partial-*")):
        _clear(path, parent)


def give_back(work: Path, target: Path) -> None:
    """End an exchange that was begun: where it is not complete, `target` gets its old content.

    Raises:
        OSError: that cannot be; `work` keeps it.
    """
    if (work / RECORD).exists():
        if is_complete(work):
            forget(work)
        else:
            put_back(work, target)
            _say(f"note: {target}: its content was being exchanged; the old one was put back")
    elif (work / OLD).exists() and ((work / CONTENT).exists() or not os.path.lexists(target)):
        _return_old(work / OLD, target)


def content_of_killed(target: Path) -> str:
    """For a message about a missing directory: where its content is, if a run was killed while it replaced it."""
    old = target.absolute().with_name(f".{target.name}.partial") / OLD
    return f"; a run was killed while it replaced it, and what was there is in {old}" if old.is_dir() else ""


def settle(work: Path, target: Path) -> None:
    """`give_back`, then remove the rest. Raises what it raises, and removes nothing then."""
    give_back(work, target)
    for path in work.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """`path`, or with a number behind it where the name is taken."""
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in range(1, 1000))
    return next(name for name in names if not os.path.lexists(name))


def _return_old(old: Path, target: Path) -> None:
    """After the first of two renames."""
    place = target if not os.path.lexists(target) else free_name(target.with_name(f"{target.name}.old"))
    rename_without_replacing(old, place)
    _say(f"note: {target}: was being replaced; what was there before is at {place}")


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


def _clear(path: Path, target: Path) -> None:
    with contextlib.suppress(LockedError, OSError), file_lock(path / LOCK) as is_certain:
        if is_certain:
            settle(path, target)
            _say(f"note: {path}: left by a run that was killed; removed")
    _remove_empty(path)


def _settle_at_the_end(path: Path, target: Path) -> None:
    try:
        settle(path, target)
    except OSError as error:
        _say(f"warning: {path / OLD}: was at {target} before and cannot be put back ({error}); move it back by hand")
    else:
        if set(os.listdir(path)) - {LOCK}:
            _say(f"warning: {path}: cannot be removed whole; remove it by hand")


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
