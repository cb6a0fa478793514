"""The table engine x family: every comparison is a line, and so is every engine that failed."""

import math
import time
import traceback
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from tests.serving.reference import Continuation

# float32 everywhere: what is left are different orders of summation.
LIMIT = 2e-3
REASON_LENGTH = 160

Answer = Callable[[], Sequence[Continuation]]


class Report:
    """The table, and whether all of it is as it should be."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []
        self.failed = False
        self._begin = time.monotonic()

    def progress(self, text: str) -> None:
        """One line with the seconds since the start."""
        print(f"[{time.monotonic() - self._begin:5.0f} s] {text}", flush=True)

    def compare(self, model: str, engine: str, answer: Answer, theirs: Sequence[Continuation]) -> None:
        """What `answer` gives against the reference `theirs`, all of whose tokens it must give.

        A call that raises is a line with its reason, and the run goes on.
        """
        ours = self.attempt(model, engine, answer)
        if ours is None:
            return
        pairs = list(zip(ours, theirs, strict=False))
        tokens = sum(one.equal_tokens(two) for one, two in pairs)
        wanted = sum(len(two.tokens) for two in theirs)
        difference = max((one.difference(two) for one, two in pairs), default=math.inf)
        good = tokens == wanted > 0 and difference <= LIMIT
        told = sum(one.told() for one in ours)
        self._add(model, engine, f"{tokens} of {wanted}", f"{difference:.1e} over {told}", "good" if good else "WRONG")
        self.failed |= not good

    def attempt(self, model: str, engine: str, call: Callable[[], object]) -> object:
        """The call's result; None where it raised, which is noted."""
        try:
            return call()
        except Exception as error:  # Whatever an engine does, the others are still to be asked.
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[-1].strip()}"[:REASON_LENGTH]
            self._add(model, engine, "", reason, "FAILED")
            self.failed = True
            return None

    def print(self) -> None:
        """The whole table."""
        table = Table("model", "engine", "greedy tokens equal", "largest difference of log-probabilities", "")
        for row in self.rows:
            table.add_row(*row)
        Console(width=160).print(table)

    def _add(self, *row: str) -> None:
        self.rows.append(row)
        self.progress(" | ".join(row))
