"""Signals that ask a run to save and end, as of a time limit or preemption. Imports are few: handlers come first."""

import os
import signal
import sys
import time

from megatron_moe_lpr.processes import STOP_SIGNALS, start_thread

EXIT_REQUEUE = 75
"""Exit code of a run that saved because it was asked to stop; started again, it resumes (EX_TEMPFAIL)."""

LEAVE_SECONDS = 10
"""A process without anything to save that waits inside a library ends so long after a signal."""


class StopRequest:
    """Keeps a signal until the current step is done; while there is nothing to save, a signal ends the process."""

    def __init__(self, nothing_to_save: bool = False) -> None:
        self.received: signal.Signals | None = None
        self.nothing_to_save = nothing_to_save
        self.has_stepped = False
        # Before the handlers: an exit while a thread is started would leave the lock of threading in a wrong state.
        if nothing_to_save:
            self._leave_from_libraries()
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
        if self.may_leave():
            sys.exit(EXIT_REQUEUE)

    def may_leave(self) -> bool:
        """Whether this process may end at once, without saving."""
        return self.nothing_to_save

    def _leave_from_libraries(self) -> None:
        """End the process also while a library waits for other ranks, when Python does not run its signal handlers."""
        arrived, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        start_thread(lambda: self._watch(arrived), "signals that arrive while a library waits")

    def _watch(self, arrived: int) -> None:
        while number := os.read(arrived, 1):
            if number[0] in STOP_SIGNALS and self.may_leave():
                time.sleep(LEAVE_SECONDS)
                if self.may_leave():
                    os._exit(EXIT_REQUEUE)


_request: StopRequest | None = None


def stop_request(nothing_to_save: bool = False) -> StopRequest:
    """Return the StopRequest of this process, which the first call makes."""
    global _request
    if _request is None:
        _request = StopRequest(nothing_to_save)
    return _request
