"""A lock file that shows whether its process is alive: by `flock`, and by a time that the process keeps refreshing."""

import contextlib
import fcntl
import os
import threading
from pathlib import Path

from megatron_moe_lpr.processes import STOP_SIGNALS, shielded_from

REFRESH_SECONDS = 2.0


class LockFile:
    """A lock file that this process holds open until `close`."""

    def __init__(self, path: Path) -> None:
        """Create or empty the file and lock it. The lock stays with the file when it is renamed."""
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self.flock, self.refreshed = self._lock(), self._refresh()
        """Whether the file system supports `flock`, and setting the file's time."""
        self.content = b""
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()
        _open_descriptors.add(self.descriptor)

    def write(self, content: bytes) -> None:
        """Write the file's content; call it once."""
        self.content = content
        with open(self.descriptor, "wb", closefd=False) as file:
            file.write(content)

    def start_refreshing(self) -> None:
        """Start a thread that refreshes the file's time every few seconds until `close`."""
        self.thread = threading.Thread(target=self._refresh_until_closed, daemon=True)
        # As in `StopRequest`: no signal may end the process while it starts a thread.
        with shielded_from(STOP_SIGNALS):
            self.thread.start()

    def close(self) -> None:
        """Release the lock, without waiting for the thread: it may hang with the file system."""
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

    def _refresh_until_closed(self) -> None:
        while not self.ended.wait(REFRESH_SECONDS) and self._is_own():
            self._refresh()
        self._close_descriptor()

    def _is_own(self) -> bool:
        """Whether the file still names this process; another one may have taken the lock over."""
        try:
            return os.pread(self.descriptor, len(self.content) + 1, 0) == self.content
        except OSError:
            return True  # The file cannot be read: keep refreshing it.

    def _close_descriptor(self) -> None:
        _open_descriptors.discard(self.descriptor)
        os.close(self.descriptor)


_open_descriptors: set[int] = set()


def _close_in_child() -> None:
    """Close the lock in a forked data worker: one that outlives this process must not keep the lock."""
    for descriptor in _open_descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _open_descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)


def is_locked(path: Path) -> bool | None:
    """Whether a process holds `flock` on the file; None: no such file, or its file system has no locks."""
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
    """A pair of numbers (inode, time) that changes when the file is refreshed or replaced; None: it is gone."""
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
