"""Directories of index maps that several runs build at the same moment: whole at every moment, whoever comes first.

What is built follows from the directory's name alone, so all runs build the same: the first keeps its name, and the
others use what it built. Each builds below a name of its own, which it holds by a lock; what a killed run left there
nobody holds, and the next run that builds removes it.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_moe_lpr.data.reading.index_maps import are_intact
from megatron_moe_lpr.errors import UserError, naming
from megatron_moe_lpr.files.checksums import MANIFEST
from megatron_moe_lpr.files.filesystem import sync_directory, sync_tree

LOCK, MAPS = "lock", "maps"
YOUNG_SECONDS = 60.0
"""A run that has just begun has its directory already and its lock not yet."""
OLD_SECONDS = 86400.0
"""What has no lock, or lies where there are none, is removed after a day."""
_LEFTOVER = re.compile(r"\.[0-9a-f]{16}\.(partial|old)-.+")


@contextlib.contextmanager
def build_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory whose files are in `directory` when the block ends without an error.

    An intact `directory` that has appeared meanwhile stays as it is; the files of a damaged one are replaced one by
    one, so that at no moment one is missing to another run. On any error nothing is left.

    Raises:
        UserError: the files cannot be put there.
    """
    parent = directory.parent
    parent.mkdir(parents=True, exist_ok=True)
    partial = parent / f".{directory.name}.partial-{os.getpid()}-{secrets.token_hex(6)}"
    with naming(parent):
        (partial / MAPS).mkdir(parents=True)
        try:
            with _held(partial / LOCK) as now:
                remove_leftovers(parent, now)
                yield partial / MAPS
                sync_tree(partial / MAPS)
                _publish(partial / MAPS, directory)
                sync_directory(parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(parent: Path, now: float) -> None:
    """Remove what runs that were killed have left in a cache; what a live run builds stays.

    Args:
        now: the time of the file system, which may lie on another machine.
    """
    for path in parent.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            # Another run may remove it at the same moment.
            with contextlib.suppress(FileNotFoundError):
                if _is_abandoned(path, now):
                    shutil.rmtree(path, ignore_errors=True)


def _publish(maps: Path, directory: Path) -> None:
    try:
        os.rename(maps, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    if are_intact(directory):
        return
    _replace_files(maps, directory)
    if not are_intact(directory):
        raise UserError(f"{directory}: the index maps are damaged again as soon as they are written; check the disk")


def _replace_files(maps: Path, directory: Path) -> None:
    """Each at once, the manifest of the checksums last; what is not of these maps goes."""
    names = sorted(
        (path.relative_to(maps) for path in maps.rglob("*") if path.is_file()), key=lambda name: name == MANIFEST
    )
    for path in [path for path in directory.rglob("*") if path.is_file()]:
        if path.relative_to(directory) not in names:
            path.unlink(missing_ok=True)
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(maps / name, directory / name)
    sync_tree(directory)


def _files(directory: Path) -> list[Path]:
    return [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]


@contextlib.contextmanager
def _held(path: Path) -> Iterator[float]:
    """Lock a new file; yields when it was made, by the file system's clock. The system frees it where we die."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # Where the file system knows no locks, age decides.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def _is_abandoned(path: Path, now: float) -> bool:
    try:
        descriptor = os.open(path / LOCK, os.O_RDWR)
    except OSError:
        return now - path.stat().st_mtime > OLD_SECONDS
    try:
        age = now - os.fstat(descriptor).st_mtime
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return age > YOUNG_SECONDS
    except BlockingIOError:
        return False
    except OSError:
        return age > OLD_SECONDS
    finally:
        os.close(descriptor)
