"""Destinations of log records; where one fails or hangs, the run continues and the records are written later."""

import collections
import dataclasses
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_moe_lpr.files.atomic_file import atomic_file
from megatron_moe_lpr.processes import start_thread
from megatron_moe_lpr.training.logs.event_file import EventFile

RETRY_SECONDS = 30.0
"""Time between a failure of a destination and the next try."""
MOST_WAITING = 10_000
"""Most records that wait for a failing destination; the oldest are dropped."""
FLUSH_SECONDS = 5.0
CLOSE_SECONDS = 30.0
"""How long a run waits for a destination that hangs, before a checkpoint and at its end."""
WANDB_ID_FILE = "wandb_run_id"


@dataclasses.dataclass(frozen=True)
class Record:
    """Numbers of one step."""

    kind: str
    iteration: int
    values: Mapping[str, Any]

    def numbers(self) -> dict[str, float]:
        """The values that are numbers, by the name of their curve."""
        values = self.values.items()
        return {f"{self.kind}/{name}": value for name, value in values if isinstance(value, int | float)}


class Destination(Protocol):
    """Something that records are written to."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class RetryingSink:
    """Writes records to a destination. When it fails, one warning says why; records wait and are tried again."""

    def __init__(self, name: str, open_destination: Callable[[], Destination]) -> None:
        """Open the destination.

        Args:
            name: flag or path of the destination, for the warning.
            open_destination: opens it; called again later where it fails.
        """
        self.name, self.open_destination = name, open_destination
        self.destination: Destination | None = None
        self.waiting: collections.deque[Record] = collections.deque(maxlen=MOST_WAITING)
        self.failing, self.next_try = False, 0.0
        self._write_waiting()

    def write(self, record: Record) -> None:
        """Write this record and those that wait, or let it wait too."""
        self.waiting.append(record)
        if time.monotonic() >= self.next_try:
            self._write_waiting()

    def flush(self) -> None:
        """Do nothing: `write` has written all records unless the destination fails."""

    def close(self) -> None:
        """Try once more to write the records that wait, and close."""
        if self.waiting or self.destination is None:
            self._write_waiting()
        if self.waiting:
            _warn(f"{self.name}: {len(self.waiting):,} records were not written")
        try:
            if self.destination:
                self.destination.close()
        except (Exception, SystemExit) as error:
            self._fail(error)

    def _write_waiting(self) -> None:
        try:
            if self.destination is None:
                self.destination = self.open_destination()
            while self.waiting:
                self.destination.write(self.waiting[0])
                self.waiting.popleft()
        except (Exception, SystemExit) as error:
            self._fail(error)
            return
        if self.failing:
            self.failing = False
            _warn(f"{self.name}: works again; what waited is written")

    def _fail(self, error: BaseException) -> None:
        self.next_try = time.monotonic() + RETRY_SECONDS
        if not self.failing:
            self.failing = True
            reason = " ".join(str(error).split()) or type(error).__name__
            _warn(f"{self.name}: {reason}; the run goes on, and tries again every {RETRY_SECONDS:.0f} s")


class ThreadedSink:
    """A RetryingSink in a thread of its own, so that no step waits for a destination that hangs."""

    def __init__(self, name: str, open_destination: Callable[[], Destination]) -> None:
        self.name, self.open_destination = name, open_destination
        self.tasks: queue.Queue[Record | threading.Event | None] = queue.Queue()
        self.responds, self.warned = True, False
        self.thread = start_thread(self._work, f"{name} (records are written by the training process)")
        self.direct = RetryingSink(name, open_destination) if self.thread is None else None

    def write(self, record: Record) -> None:
        """Pass the record to the thread."""
        if self.direct:
            self.direct.write(record)
        elif self.tasks.qsize() < MOST_WAITING:
            self.tasks.put(record)

    def flush(self) -> None:
        """Wait until all records are written, at most FLUSH_SECONDS."""
        if self.direct or not self.responds:
            return
        done = threading.Event()
        self.tasks.put(done)
        self._check(done.wait(FLUSH_SECONDS), FLUSH_SECONDS)

    def close(self) -> None:
        """Write what is left and close, or abandon a destination that hangs."""
        if self.direct:
            self.direct.close()
        elif self.thread:
            self.tasks.put(None)
            patience = CLOSE_SECONDS if self.responds else FLUSH_SECONDS
            self.thread.join(patience)
            self._check(not self.thread.is_alive(), patience)

    def _work(self) -> None:
        sink = RetryingSink(self.name, self.open_destination)
        while (task := self.tasks.get()) is not None:
            if isinstance(task, threading.Event):
                task.set()
                self.responds = True
            else:
                sink.write(task)
        sink.close()

    def _check(self, is_done: bool, seconds: float) -> None:
        self.responds = is_done
        if not is_done and not self.warned:
            self.warned = True
            _warn(f"{self.name}: does not answer within {seconds:.0f} s; the run goes on without waiting for it")


class TensorBoard:
    """Event files in a directory."""

    def __init__(self, directory: Path, iteration: int, settings: Mapping[str, Any]) -> None:
        """Open a new event file, with the settings as one text at the first step that they are for."""
        self.file = EventFile(directory, iteration)
        if settings:
            self.file.add_text(iteration + 1, "config", markdown_table(settings))

    def write(self, record: Record) -> None:
        """Write the record's numbers as scalars."""
        self.file.add(record.iteration, record.numbers())

    def close(self) -> None:
        """Do nothing: every record is in the file."""


def markdown_table(settings: Mapping[str, Any]) -> str:
    """Names and values as a table in Markdown."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(text.replace("|", "\\|").split())


class WeightsAndBiases:
    """One run of a Weights & Biases project for all starts of a training run."""

    def __init__(self, project: str, name: str, directory: Path, settings: Mapping[str, Any]) -> None:
        """Start the W&B run whose id is kept in `directory`, or resume it."""
        import wandb

        identity = wandb_id(directory)
        # A resumed run may have changed settings, such as its layout.
        options = {"resume": "allow", "config": dict(settings), "allow_val_change": True}
        self.run = wandb.init(project=project, name=name, id=identity, **options) or wandb

    def write(self, record: Record) -> None:
        """Log the record's numbers at its step."""
        self.run.log(record.numbers(), step=record.iteration)

    def close(self) -> None:
        """Send what is left and end the W&B run."""
        self.run.finish()


def wandb_id(directory: Path) -> str:
    """Return the W&B id of a training run, which is kept in its directory; make one where there is none.

    Raises:
        OSError: the file cannot be read or written.
    """
    path = Path(directory) / WANDB_ID_FILE
    text = path.read_text(encoding="ascii", errors="replace").strip() if path.exists() else ""
    if text.replace("-", "").replace("_", "").isalnum() and text.isascii() and len(text) <= 64:
        return text
    identity = secrets.token_hex(4)
    with atomic_file(path) as partial:
        partial.write_text(identity + "\n", encoding="ascii")
    return identity


def _warn(words: str) -> None:
    print(f"warning: {words}", file=sys.stderr, flush=True)
