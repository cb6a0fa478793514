"""Largest memory of a process and all its descendants, while a block runs."""

import contextlib
import threading
from collections.abc import Iterator

import psutil


class Peak:
    """The largest sum that was seen."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def sample(self) -> None:
        """Take the present sum, if it is the largest so far."""
        self.num_bytes = max(self.num_bytes, tree_bytes())


@contextlib.contextmanager
def peak_memory(every_seconds: float = 5.0) -> Iterator[Peak]:
    """Yield the peak of this process's tree, sampled every so many seconds, at the beginning and at the end.

    Linux walks all pages of a process to tell what it shares: sampled every second, a tenth of a core goes to that.
    """
    peak, ended = Peak(), threading.Event()
    peak.sample()

    def watch() -> None:
        while not ended.wait(every_seconds):
            peak.sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
        peak.sample()


def tree_bytes() -> int:
    """Return the memory of this process and its descendants; what they share counts once where Linux reports shares."""
    own = psutil.Process()
    return sum(_bytes(process) for process in (own, *own.children(recursive=True)))


def _bytes(process: psutil.Process) -> int:
    try:
        found = process.memory_full_info()
        return getattr(found, "pss", found.rss)
    except psutil.Error:  # it has ended
        return 0
