"""Exchange the entries of a directory that itself must stay, because a file system is mounted at it, for example.

The old entries are renamed out of the directory and the new ones into it. A record lists both, so that a later process
can put the old entries back after a kill. All of it lies in a hidden directory WORK on the same file system:

WORK/content/     the new entries, complete and on the disk
WORK/old/         the old entries that have been moved out
WORK/moves.json   {"old": [names], "new": [names]}, from before the first rename until the exchange is finished
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.fsync import sync_directory
from megatron_moe_lpr.files.json_files import read_json, write_json
from megatron_moe_lpr.files.renaming import rename_without_replacing

CONTENT, OLD, RECORD = "content", "old", "moves.json"


def exchange_entries(work: Path, target: Path, old: Sequence[str], last: Sequence[str]) -> None:
    """Replace the entries of `target` named by `old` with those of WORK/content.

    Args:
        last: names that tell a reader that the directory is complete: removed first and added last, so that an
            incomplete directory is never taken for a complete one.

    Raises:
        OSError: a rename failed, or the name of a new entry was taken meanwhile. The old entries are back.
    """
    new = sorted(os.listdir(work / CONTENT), key=lambda name: (name in last, name))
    old = sorted(old, key=lambda name: (name not in last, name))
    write_json({"old": old, "new": new}, work / RECORD)
    try:
        (work / OLD).mkdir()
        for name in old:
            os.rename(target / name, work / OLD / name)
        sync_directory(target)
        for name in new:
            if name in last:
                sync_directory(target)
            rename_without_replacing(work / CONTENT / name, target / name)
        sync_directory(target)
    except BaseException:
        undo_exchange(work, target)
        raise


def is_exchange_complete(work: Path) -> bool:
    """Whether every new entry has reached the target."""
    return not any(os.path.lexists(work / CONTENT / name) for name in _names(work)["new"])


def undo_exchange(work: Path, target: Path) -> None:
    """Move new entries out and old ones back in, after an exchange that failed here or in a process that was killed.

    Raises:
        OSError: something else has taken a name; WORK/old keeps what could not be moved back.
    """
    names = _names(work)
    for name in reversed(names["new"]):
        if os.path.lexists(target / name) and not os.path.lexists(work / CONTENT / name):
            os.rename(target / name, work / CONTENT / name)
    for name in reversed(names["old"]):
        if os.path.lexists(work / OLD / name):
            rename_without_replacing(work / OLD / name, target / name)
    sync_directory(target)
    if (work / OLD).is_dir():
        os.rmdir(work / OLD)
    (work / RECORD).unlink()


def finish_exchange(work: Path) -> None:
    """Remove the old entries after a complete exchange, and then the record."""
    shutil.rmtree(work / CONTENT, ignore_errors=True)
    shutil.rmtree(work / OLD, ignore_errors=True)
    (work / RECORD).unlink(missing_ok=True)


def _names(work: Path) -> dict[str, list[str]]:
    record = read_json(work / RECORD)
    for names in (record.get("old"), record.get("new")):
        if not isinstance(names, list) or not all(isinstance(name, str) and "/" not in name for name in names):
            raise UserError(f"{work / RECORD}: damaged; move what {work / OLD} holds back by hand and remove {work}")
    return record
