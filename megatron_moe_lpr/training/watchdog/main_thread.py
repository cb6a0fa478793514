"""Whether the main thread of this process gets on, and where it is, seen from another thread."""

import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

from megatron_moe_lpr import liveness

LEAST_LOAD = 0.02
"""Share of a period that a main thread in long work computes: one that only polls needs less."""
LEAST_BYTES = 1 << 16
"""That a process in long work reads and writes in a period: the watch itself needs less."""
COLLECTIVES = ("distributed_c10d.py", "p2p_communication.py")
"""Files of torch and Megatron whose functions wait for other ranks."""


class MainThread:
    """The thread that makes this object."""

    def __init__(self) -> None:
        self.number = threading.get_ident()
        self._progress: tuple[int, ...] | None = None
        self._load = self._bytes = 0.0

    def frame(self) -> FrameType | None:
        """What it executes now."""
        return sys._current_frames().get(self.number)

    def place(self) -> tuple[str, bool]:
        """Words for where it is, and whether that is a collective."""
        return place_of(self.frame())

    def has_advanced(self, period: float) -> bool:
        """Whether it has made progress since the last call, `period` seconds ago."""
        before, self._progress = self._progress, liveness.progress()
        load, moved = self._processor_seconds(), _bytes_moved()
        busy = load - self._load >= LEAST_LOAD * period or moved - self._bytes >= LEAST_BYTES
        self._load, self._bytes = load, moved
        return before != self._progress or (busy and liveness.in_long_work())

    def _processor_seconds(self) -> float:
        if not hasattr(time, "pthread_getcpuclockid"):
            return time.process_time()
        return time.clock_gettime(time.pthread_getcpuclockid(self.number))


def _bytes_moved() -> float:
    """Bytes that this process has read and written: by calls, and from disks through mapped files. Linux only."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            values = dict(line.split(":") for line in file)
    except (OSError, ValueError):
        return 0.0
    return float(sum(int(values[name]) for name in ("rchar", "wchar", "read_bytes") if name in values))


def innermost(trace: TracebackType | None) -> FrameType | None:
    """The frame in which an error was raised."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame if trace else None


def place_of(frame: FrameType | None) -> tuple[str, bool]:
    """Words for where a thread is, the collective and who called it, and whether there is a collective."""
    collective, caller = None, None
    while frame is not None and caller is None:
        path = frame.f_code.co_filename
        if path.endswith(COLLECTIVES):
            collective = frame.f_code.co_name
        elif "/torch/" not in path and not path.endswith("typing_extensions.py"):  # its wrapper of deprecated functions
            caller = f"{frame.f_code.co_name} ({Path(path).name}:{frame.f_lineno})"
        frame = frame.f_back
    return (f"{collective} in {caller}" if collective else str(caller)), collective is not None
