"""Progress of long work: a bar on a terminal, a line every 30 seconds in a log file."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_INTERVAL_SECONDS = 30.0


class ProgressReport:
    """Counts finished work and shows it with rates and the remaining time.

    Args:
        description: name of the work, for example `converting`.
        total: units of work in all; None: unknown.
        enabled: whether this process prints; true on one rank.
    """

    def __init__(self, description: str, total: float | None = None, enabled: bool = True) -> None:
        self.description, self.total, self.enabled = description, total, enabled
        self.done, self.start, self.last_line = 0.0, time.monotonic(), time.monotonic()
        self.counts: dict[str, float] = {}
        console = Console(stderr=True)
        self.bar = _terminal_bar(console) if enabled and console.is_terminal else None
        if self.bar:
            self.bar.add_task(description, total=total, rates="")

    def __enter__(self) -> "ProgressReport":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()
        if self.enabled and error is None:
            print(f"{self.description}: done in {self.elapsed:.1f} s {self.rates()}".rstrip(), file=sys.stderr)

    def advance(self, amount: float, counts: Mapping[str, float] | None = None) -> None:
        """Add finished units of work, and counts by name whose rates are shown (documents, tokens, MB)."""
        self.done += amount
        for name, count in (counts or {}).items():
            self.counts[name] = self.counts.get(name, 0.0) + count
        if self.bar:
            self.bar.update(self.bar.task_ids[0], advance=amount, rates=self.rates())
        elif self.enabled and time.monotonic() - self.last_line >= LOG_INTERVAL_SECONDS:
            self.last_line = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the work began."""
        return max(time.monotonic() - self.start, 1e-9)

    def rates(self) -> str:
        """Return the rates as text, for example `12,345 tokens/s 1.2 MB/s`."""
        return " ".join(
            f"{count / self.elapsed:,.{0 if count >= 100 else 1}f} {name}/s" for name, count in self.counts.items()
        )

    def line(self) -> str:
        """Return a line for a log file: percentage, rates, remaining time."""
        if not self.total:
            return f"{self.description}: {self.rates()}, {self.elapsed:.0f} s"
        share = min(self.done / self.total, 1.0)
        left = self.elapsed * (1 - share) / share if share else float("nan")
        return f"{self.description}: {share:.0%} {self.rates()}, {left:.0f} s left"


def _terminal_bar(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rates]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)
