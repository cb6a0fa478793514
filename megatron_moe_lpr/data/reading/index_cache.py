"""Cache directories for index maps, safe when several runs build the same one at the same time.

The name of a directory determines its content, so all runs build the same files: the first to finish renames its work
directory into place, the others use that. Each run locks its work directory; the next build removes work directories
without a lock, which killed runs have left.
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
"""Age below which a work directory without a lock is kept: its run may be about to lock it."""
OLD_SECONDS = 86400.0
"""Age above which a work directory is removed on file systems without locks."""
_LEFTOVER = re.compile(r"\.[0-9a-f]{16}\.(partial|old)-.+")


@contextlib.contextmanager
def build_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty work directory that becomes `directory` when the block ends without an error.

    If an intact `directory` has appeared in the meantime, it is kept; files of a damaged one are replaced one by one,
    so that other runs find every file at any moment. After an error nothing is left behind.

    Raises:
        UserError: the files cannot be written there.
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
    """Remove work directories that killed runs have left in a cache; those of live runs are kept.

    Args:
        now: time by the clock of the file server.
    """
    for path in parent.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            # Another run may be removing it too.
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
    """Replace each file atomically, the checksum file last, and remove all other files."""
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
    """Create and lock a file; yield its creation time by the file server's clock. The lock ends with the process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # Without locks on this file system, `remove_leftovers` goes by age.
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
