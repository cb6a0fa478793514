"""The signs of life that a process leaves on its lock file: `flock`, and a time that it sets anew again and again."""

import contextlib
import fcntl
import os
import threading
from pathlib import Path

from megatron_moe_lpr.processes import STOP_SIGNALS, shielded_from

REFRESH_SECONDS = 2.0


class LockFile:
    """An open lock file of this process, which keeps it open until `close`."""

    def __init__(self, path: Path) -> None:
        """Create or empty it, and lock it; renaming it changes nothing."""
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self.flock, self.refreshed = self._lock(), self._refresh()
        """Whether the file system has such locks, and lets this process set the file's time."""
        self.content = b""
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()
        _open_descriptors.add(self.descriptor)

    def write(self, content: bytes) -> None:
        """Fill it, once."""
        self.content = content
        with open(self.descriptor, "wb", closefd=False) as file:
            file.write(content)

    def start_refreshing(self) -> None:
        """Let a thread do it, as long as this process lives."""
        self.thread = threading.Thread(target=self._refresh_again_and_again, daemon=True)
        # As in `StopRequest`: no signal may end the process out of the start of a thread.
        with shielded_from(STOP_SIGNALS):
            self.thread.start()

    def close(self) -> None:
        """Give up the lock, without waiting for a thread that hangs as long as the file system does."""
        with contextlib.suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        self.ended.set()
        if self.thread is None:
            self._close_descriptor()

    def _lock(self) -> bool:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _refresh(self) -> bool:
        try:
            os.utime(self.descriptor)
        except OSError:
            return False
        return True

    def _refresh_again_and_again(self) -> None:
        while not self.ended.wait(REFRESH_SECONDS) and self._is_own():
            self._refresh()
        self._close_descriptor()

    def _is_own(self) -> bool:
        """Whether nobody has put another process's name into the file."""
        try:
            return os.pread(self.descriptor, len(self.content) + 1, 0) == self.content
        except OSError:
            return True  # not known

    def _close_descriptor(self) -> None:
        _open_descriptors.discard(self.descriptor)
        os.close(self.descriptor)


_open_descriptors: set[int] = set()


def _close_in_child() -> None:
    """A forked data worker that outlives this process for a moment must not hold its lock."""
    for descriptor in _open_descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _open_descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)


def is_locked(path: Path) -> bool | None:
    """Whether a process holds `flock` on the file; None: there is no file, or no such lock on its file system."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def last_refreshed(path: Path) -> tuple[int, int] | None:
    """A pair of numbers that another one follows whenever the file is refreshed or replaced; None: it is gone."""
    try:
        # Opening it makes a network file system ask its server.
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        return status.st_ino, status.st_mtime_ns
    finally:
        os.close(descriptor)
