"""One writer for each dataset: two runs with one prefix would each finish, and one output would be lost."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_moe_lpr.errors import UserError

# File systems that know no such lock; there `publish` alone refuses what has appeared meanwhile.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def output_lock(prefix: str) -> Iterator[None]:
    """Hold `prefix` for this process until the block ends. The system frees it where the process dies.

    Raises:
        UserError: another run writes it now; the message says which.
    """
    path = Path(prefix).with_name(f".{Path(prefix).name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(path, prefix)
    try:
        yield
    finally:
        # First the name, then the lock: nobody may find a locked file that is about to lose its name.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, prefix: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise UserError(
                f"--output-prefix {prefix}: another run writes it now ({owner or 'just started'}); wait for it, or "
                "choose another prefix"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
        if _is_current(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        # The run before removed the file between our opening and our locking it.
        os.close(descriptor)


def _is_current(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
