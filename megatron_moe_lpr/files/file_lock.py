"""Locks on files that the system frees when their process dies."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_moe_lpr.errors import UserError

# Of file systems that know no such lock.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class LockedError(Exception):
    """Another process has the lock; the message says which."""


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[bool]:
    """Hold the lock of the file `path`, which is made for it and removed at the end of the block.

    Yields:
        False: the file system has no locks, so that another process may be in its block too.

    Raises:
        LockedError: another process holds it.
        OSError: the file cannot be made.
    """
    descriptor, is_certain = _acquire(path)
    try:
        yield is_certain
    finally:
        # First the name, then the lock: nobody may find a locked file that is about to lose its name.
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def directory_lock(directory: Path, flag: str) -> Iterator[None]:
    """Be the only run that writes to `directory`, which is made where it is missing, until the block ends.

    Raises:
        UserError: another run does; the message says which.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(directory / ".lock"))
        except LockedError as owner:
            raise UserError(
                f"{flag} {directory}: another run writes there now ({owner}); wait for it, or choose another directory"
            ) from None
        yield


def _acquire(path: Path) -> tuple[int, bool]:
    while True:
        descriptor, is_certain = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise LockedError(owner or "just started") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            is_certain = False
        if _is_current(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor, is_certain
        # The process before removed the file between our opening and our locking it.
        os.close(descriptor)


def _is_current(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
