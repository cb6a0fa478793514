"""Output that appears whole or not at all."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_moe_lpr.errors import UserError, naming
from megatron_moe_lpr.liveness import advance


@contextlib.contextmanager
def atomic_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty sibling directory that becomes `target` when the block ends without an error.

    An existing `target` stays untouched until then. On any error, Ctrl-C included, the sibling is removed. What is in
    it is on the disk before it gets its name (fsync), and so is the name when this returns.

    Raises:
        UserError: `target` exists, is not an empty directory, and `overwrite` is off.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: exists and is not a directory")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"{target}: exists and is not empty; choose another directory or pass --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        _replace_directory(partial, target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_directory(source: Path, target: Path) -> None:
    if not target.exists():
        os.rename(source, target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a sibling path that replaces `target` when the block ends without an error, and is removed otherwise.

    The content is on the disk before the rename, and the rename when this returns (fsync).
    """
    target = Path(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        yield partial
        sync_file(partial)
        os.replace(partial, target)
        sync_directory(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def append_whole(path: Path, data: bytes) -> None:
    """Append to a file, all or nothing.

    Raises:
        OSError: naming the file, for example because the disk is full; the file stays as it was.
    """
    with naming(path), open(path, "ab", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        try:
            view = memoryview(data)
            while view:
                view = view[stream.write(view) :]
        except OSError:
            os.ftruncate(stream.fileno(), size)
            raise


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk; a power failure then cannot leave it empty under its name."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk: call it after a rename that must last."""
    _sync(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))


def sync_tree(directory: Path) -> None:
    """`sync_file` for every file below a directory, and `sync_directory` for it and every directory in it."""
    for parent, _, names in os.walk(directory):
        for name in names:
            sync_file(Path(parent, name))
            advance()
        sync_directory(Path(parent))


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(16 << 20), b""):
            digest.update(chunk)
            advance()
    return digest.hexdigest()


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems (FUSE, old NFS) know no fsync of directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
