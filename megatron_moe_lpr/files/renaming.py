"""Renames that never replace anything by accident: Linux's renameat2, or the closest that os.rename can do."""

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

_NOREPLACE, _EXCHANGE = 1, 2
_WORKING_DIRECTORY = -100  # AT_FDCWD
# Returned by kernels, sandboxes and file systems (NFS, many of FUSE) that do not support the flags.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def rename_without_replacing(source: Path, target: Path) -> None:
    """Rename a file or directory to a name that is free.

    Raises:
        FileExistsError: something is at `target`, even a dangling symbolic link; nothing has changed.
        OSError: the file system refuses.
    """
    if _renameat2(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two files or directories in one step, which a kill cannot interrupt.

    Returns:
        False: the system or the file system cannot do this, and nothing has changed.

    Raises:
        OSError: the file system supports it, but refuses here.
    """
    return _renameat2(first, second, _EXCHANGE)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Call renameat2; False where the system does not support it."""
    call = _system_call()
    if call is None:
        return False
    if not call(_WORKING_DIRECTORY, os.fsencode(source), _WORKING_DIRECTORY, os.fsencode(target), flag):
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@functools.cache
def _system_call() -> Callable[..., int] | None:
    """The C library's renameat2 (glibc since 2.28); None where it has none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call
