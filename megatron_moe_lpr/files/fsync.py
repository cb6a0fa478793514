"""Wait until files and directory entries are on the disk (fsync), so that a power failure cannot lose them."""

import errno
import os
from pathlib import Path

from megatron_moe_lpr.liveness import advance


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk; a power failure then cannot leave it empty under its name."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk. To be called after a rename that must last."""
    _sync(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))


def sync_tree(directory: Path) -> None:
    """Wait until every file and directory below `directory`, and `directory` itself, is on the disk."""
    for parent, _, names in os.walk(directory):
        for name in names:
            sync_file(Path(parent, name))
            advance()
        sync_directory(Path(parent))


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems (FUSE, old NFS) do not support fsync of directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
