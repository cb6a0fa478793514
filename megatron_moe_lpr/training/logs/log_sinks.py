"""Where records go, and what happens when a place fails: what only logs must not end a run or cost steps."""

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

from megatron_moe_lpr.files.filesystem import atomic_file
from megatron_moe_lpr.processes import start_thread
from megatron_moe_lpr.training.logs.event_file import EventFile

RETRY_SECONDS = 30.0
"""After a failure a place is left alone for so long."""
MOST_WAITING = 10_000
"""Records that wait for a place that fails; of more, the oldest are given up."""
FLUSH_SECONDS = 5.0
CLOSE_SECONDS = 30.0
"""How long a run waits for a place that does not answer, before a checkpoint and at its end."""
WANDB_ID_FILE = "wandb_run_id"


@dataclasses.dataclass(frozen=True)
class Record:
    """Numbers of one step."""

    kind: str
    iteration: int
    values: Mapping[str, Any]

    def numbers(self) -> dict[str, float]:
        """Those of `values` that are numbers, by the name of their curve."""
        values = self.values.items()
        return {f"{self.kind}/{name}": value for name, value in values if isinstance(value, int | float)}


class Place(Protocol):
    """Something that takes records."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class LastingSink:
    """Hands records on to a place. Where it fails, one warning says why; they wait and are tried again."""

    def __init__(self, name: str, open_place: Callable[[], Place]) -> None:
        """Open the place.

        Args:
            name: of the place, with its flag or path, for the warning.
            open_place: called again later where it fails.
        """
        self.name, self.open_place = name, open_place
        self.place: Place | None = None
        self.waiting: collections.deque[Record] = collections.deque(maxlen=MOST_WAITING)
        self.failing, self.next_try = False, 0.0
        self._hand_on()

    def write(self, record: Record) -> None:
        """Hand on this record and those that wait."""
        self.waiting.append(record)
        if time.monotonic() >= self.next_try:
            self._hand_on()

    def flush(self) -> None:
        """Nothing more to do: `write` leaves nothing behind unless the place fails."""

    def close(self) -> None:
        """Try once more what waits, and close."""
        if self.waiting or self.place is None:
            self._hand_on()
        if self.waiting:
            _warn(f"{self.name}: {len(self.waiting):,} records were not written")
        try:
            if self.place:
                self.place.close()
        except (Exception, SystemExit) as error:
            self._fail(error)

    def _hand_on(self) -> None:
        try:
            if self.place is None:
                self.place = self.open_place()
            while self.waiting:
                self.place.write(self.waiting[0])
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
    """A LastingSink on a thread of its own: a place that hangs makes nobody wait."""

    def __init__(self, name: str, open_place: Callable[[], Place]) -> None:
        self.name, self.open_place = name, open_place
        self.tasks: queue.Queue[Record | threading.Event | None] = queue.Queue()
        self.answers, self.told = True, False
        self.thread = start_thread(self._work, f"{name} (records are written by the training process)")
        self.direct = LastingSink(name, open_place) if self.thread is None else None

    def write(self, record: Record) -> None:
        """Leave the record to the thread."""
        if self.direct:
            self.direct.write(record)
        elif self.tasks.qsize() < MOST_WAITING:
            self.tasks.put(record)

    def flush(self) -> None:
        """Wait, not for long, until all records so far are written."""
        if self.direct or not self.answers:
            return
        done = threading.Event()
        self.tasks.put(done)
        self._check(done.wait(FLUSH_SECONDS), FLUSH_SECONDS)

    def close(self) -> None:
        """Write what is left and close, or leave a place that hangs behind."""
        if self.direct:
            self.direct.close()
        elif self.thread:
            self.tasks.put(None)
            patience = CLOSE_SECONDS if self.answers else FLUSH_SECONDS
            self.thread.join(patience)
            self._check(not self.thread.is_alive(), patience)

    def _work(self) -> None:
        sink = LastingSink(self.name, self.open_place)
        while (task := self.tasks.get()) is not None:
            if isinstance(task, threading.Event):
                task.set()
                self.answers = True
            else:
                sink.write(task)
        sink.close()

    def _check(self, is_done: bool, seconds: float) -> None:
        self.answers = is_done
        if not is_done and not self.told:
            self.told = True
            _warn(f"{self.name}: does not answer within {seconds:.0f} s; the run goes on without waiting for it")


class TensorBoard:
    """Event files in a directory."""

    def __init__(self, directory: Path, iteration: int, settings: Mapping[str, Any]) -> None:
        """Open a new event file, with the settings as one text at the first step that they are for."""
        self.file = EventFile(directory, iteration)
        if settings:
            self.file.add_text(iteration + 1, "config", markdown_table(settings))

    def write(self, record: Record) -> None:
        """Its numbers as scalars."""
        self.file.add(record.iteration, record.numbers())

    def close(self) -> None:
        """Every record is in the file."""


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
        """Begin the run whose id `directory` keeps, or go on with it."""
        import wandb

        identity = wandb_id(directory)
        # A run that goes on may have other free settings, such as its layout.
        options = {"resume": "allow", "config": dict(settings), "allow_val_change": True}
        self.run = wandb.init(project=project, name=name, id=identity, **options) or wandb

    def write(self, record: Record) -> None:
        """Its numbers, at its step."""
        self.run.log(record.numbers(), step=record.iteration)

    def close(self) -> None:
        """Send what is left."""
        self.run.finish()


def wandb_id(directory: Path) -> str:
    """The id of a training run, kept in its directory.

    Raises:
        OSError: it can't be read or kept.
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
