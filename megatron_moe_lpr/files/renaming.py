"""Renames that replace nothing by accident: Linux's renameat2 where there is one, and what comes closest elsewhere."""

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

_NOREPLACE, _EXCHANGE = 1, 2
_WORKING_DIRECTORY = -100  # AT_FDCWD
# Of a kernel, a sandbox or a file system (NFS, many of FUSE) that does not know the flags.
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def rename_without_replacing(source: Path, target: Path) -> None:
    """Rename a file or directory to a name that is free.

    Raises:
        FileExistsError: something is at `target`, be it a dangling symbolic link; nothing has changed.
        OSError: the file system refuses.
    """
    if _renameat2(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def exchange(first: Path, second: Path) -> bool:
    """Let two names swap what they mean, in one step that no kill can divide.

    Returns:
        False: the system or the file system cannot do this, and nothing has changed.

    Raises:
        OSError: the file system can, but refuses here.
    """
    return _renameat2(first, second, _EXCHANGE)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    call = _system_call()
    if call is None:
        return False
    if not call(_WORKING_DIRECTORY, os.fsencode(source), _WORKING_DIRECTORY, os.fsencode(target), flag):
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@functools.cache
def _system_call() -> Callable[..., int] | None:
    """The C library's renameat2 (glibc since 2.28); None: it has none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call
