"""Signals that ask a run to save and leave: a time limit, a preemption. Imports nothing heavy: handlers come first."""

import os
import signal
import sys
import time

from megatron_moe_lpr.processes import STOP_SIGNALS, start_thread

EXIT_REQUEUE = 75
"""Exit code of a run that saved because it was asked to stop: start it again and it goes on (EX_TEMPFAIL)."""

LEAVE_SECONDS = 10
"""A process that has nothing to save yet and waits inside a library hears a signal no later than this."""


class StopRequest:
    """Remembers a signal until the step is done. As long as there is nothing to save, a signal ends the process."""

    def __init__(self, nothing_to_save: bool = False) -> None:
        self.received: signal.Signals | None = None
        self.nothing_to_save = nothing_to_save
        self.has_stepped = False
        # Before the handlers: an exit out of the start of a thread leaves its lock in a state that is an error itself.
        if nothing_to_save:
            self._leave_from_libraries()
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
        if self.may_leave():
            sys.exit(EXIT_REQUEUE)

    def may_leave(self) -> bool:
        """Whether this process may end at once."""
        return self.nothing_to_save

    def _leave_from_libraries(self) -> None:
        """Python runs handlers between two of its instructions, and so not while a library waits for other ranks."""
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
    """The one of this process, made by the first call."""
    global _request
    if _request is None:
        _request = StopRequest(nothing_to_save)
    return _request
