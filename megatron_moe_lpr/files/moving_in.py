"""New entries for a directory that itself must stay, because a file system is mounted at it, for example.

The old entries move aside, the new ones in, each by a rename. A record says which, so that whoever finds it after a
kill can put the old ones back. It lies in a hidden directory on the same file system:

WORK/content/     the new entries, complete and on the disk
WORK/old/         the old ones, as far as they have been moved
WORK/moves.json   {"old": [names], "new": [names]}, there from before the first rename until all is over
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.filesystem import atomic_file, sync_directory
from megatron_moe_lpr.files.json_files import read_json
from megatron_moe_lpr.files.renaming import rename_without_replacing

CONTENT, OLD, RECORD = "content", "old", "moves.json"


def move_in(work: Path, target: Path, old: Sequence[str], last: Sequence[str]) -> None:
    """Give `target` the entries of WORK/content in the place of those named by `old`.

    Args:
        last: names by which a reader knows that the directory is complete: of the old entries they go first, of the
            new ones they come last, so that no half of it can be taken for a whole.

    Raises:
        OSError: a rename failed, or something has taken a new entry's name meanwhile. The old entries are back.
    """
    new = sorted(os.listdir(work / CONTENT), key=lambda name: (name in last, name))
    old = sorted(old, key=lambda name: (name not in last, name))
    with atomic_file(work / RECORD) as partial:
        partial.write_text(json.dumps({"old": old, "new": new}), encoding="utf-8")
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
        put_back(work, target)
        raise


def is_complete(work: Path) -> bool:
    """Whether every new entry has reached the target."""
    return not any(os.path.lexists(work / CONTENT / name) for name in _names(work)["new"])


def put_back(work: Path, target: Path) -> None:
    """Undo what `move_in` did so far, here or in a process that was killed: new entries out, old ones in.

    Raises:
        OSError: something else is in the way; WORK/old keeps what could not be put back.
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


def forget(work: Path) -> None:
    """Remove the old entries after `move_in`, and the record last."""
    shutil.rmtree(work / CONTENT, ignore_errors=True)
    shutil.rmtree(work / OLD, ignore_errors=True)
    (work / RECORD).unlink(missing_ok=True)


def _names(work: Path) -> dict[str, list[str]]:
    record = read_json(work / RECORD)
    for names in (record.get("old"), record.get("new")):
        if not isinstance(names, list) or not all(isinstance(name, str) and "/" not in name for name in names):
            raise UserError(f"{work / RECORD}: damaged; move what {work / OLD} holds back by hand and remove {work}")
    return record
