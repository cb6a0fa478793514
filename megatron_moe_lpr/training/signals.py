"""Signals that ask a run to save and leave: a time limit, a preemption."""

import signal

ASKS_TO_STOP = (signal.SIGTERM, signal.SIGUSR1)

EXIT_REQUEUE = 75
"""Exit code of a run that saved because it was asked to stop: start it again and it goes on (EX_TEMPFAIL)."""


class StopRequest:
    """Remembers a signal until the step is done."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in ASKS_TO_STOP:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
