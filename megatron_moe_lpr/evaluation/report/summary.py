"""Mean and spread of a number over training runs that differ in their seed."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Summary:
    """A number over several runs.

    Attributes:
        mean: mean over the runs.
        spread: half the distance between the lowest and the highest run; None for a single run.
    """

    mean: float
    spread: float | None = None


def summarize(values: Iterable[float | None]) -> Summary | None:
    """Summarize one value of each run; None if there is no run, or one without a value."""
    given = list(values)
    numbers = [value for value in given if value is not None]
    if not numbers or len(numbers) < len(given):
        return None
    spread = (max(numbers) - min(numbers)) / 2 if len(numbers) > 1 else None
    return Summary(sum(numbers) / len(numbers), spread)
