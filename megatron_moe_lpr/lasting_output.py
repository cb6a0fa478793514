"""Standard output and error whose failures do not end the process: a run of weeks must survive a closed terminal."""

import atexit
import contextlib
import os
import sys
from typing import Any, TextIO


class LastingStream:
    """A text stream that ignores write errors, after one warning on another stream."""

    def __init__(self, stream: TextIO, name: str, warnings: TextIO | None) -> None:
        self._stream, self._name, self._warnings = stream, name, warnings
        self._warned = False

    def write(self, text: str) -> int:
        """Write; text that cannot be written is dropped."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        """Flush; text that cannot be written now stays in the buffer."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def finish(self) -> None:
        """Flush for the last time; where that fails, redirect to /dev/null, so that Python's own flush succeeds."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._discard()

    def _fail(self, error: Exception) -> None:
        if isinstance(error, BrokenPipeError):
            self._discard()
        if self._warned or self._warnings is None:
            return
        self._warned = True
        with contextlib.suppress(OSError, ValueError):
            print(
                f"warning: {self._name}: {error}; the run goes on without it, metrics.jsonl has its numbers",
                file=self._warnings,
                flush=True,
            )

    def _discard(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlast_readers() -> None:
    """Replace this process's standard output and error by streams that survive a closed reader and a full disk."""
    output, errors = sys.stdout, sys.stderr
    for name, words, other in (("stdout", "standard output", errors), ("stderr", "standard error", output)):
        stream = getattr(sys, name)
        if stream is not None:  # None: closed before Python started, and print ignores it
            lasting = LastingStream(stream, words, other)
            setattr(sys, name, lasting)
            atexit.register(lasting.finish)
