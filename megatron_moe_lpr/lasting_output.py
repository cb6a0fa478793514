"""Standard output and error that a process outlives: a run of weeks shall not end because nobody reads its lines."""

import atexit
import contextlib
import os
import sys
from typing import Any, TextIO


class LastingStream:
    """A text stream whose failures are told once, elsewhere, and then passed over."""

    def __init__(self, stream: TextIO, name: str, elsewhere: TextIO | None) -> None:
        self._stream, self._name, self._elsewhere = stream, name, elsewhere
        self._told = False

    def write(self, text: str) -> int:
        """Write, or give the text up."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        """Flush; what cannot be written now is tried again with the next text."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def finish(self) -> None:
        """Let Python's last flush succeed: where the stream still fails, the rest goes nowhere."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._discard()

    def _fail(self, error: Exception) -> None:
        if isinstance(error, BrokenPipeError):
            self._discard()
        if self._told or self._elsewhere is None:
            return
        self._told = True
        with contextlib.suppress(OSError, ValueError):
            print(
                f"warning: {self._name}: {error}; the run goes on without it, metrics.jsonl has its numbers",
                file=self._elsewhere,
                flush=True,
            )

    def _discard(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlast_readers() -> None:
    """From now on this process does not end because its standard output or error is closed or on a full disk."""
    output, errors = sys.stdout, sys.stderr
    for name, words, elsewhere in (("stdout", "standard output", errors), ("stderr", "standard error", output)):
        stream = getattr(sys, name)
        if stream is not None:  # closed before Python started: print passes over it
            lasting = LastingStream(stream, words, elsewhere)
            setattr(sys, name, lasting)
            atexit.register(lasting.finish)
