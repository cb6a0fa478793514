"""One figure of several runs that differ in their seed: its mean and how far they lie apart."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean over runs.

    Attributes:
        mean: of all runs.
        spread: half the distance between the lowest and the highest run; None for a single run.
    """

    mean: float
    spread: float | None = None


def summarize(values: Iterable[float | None]) -> Summary | None:
    """Of one value a run; None where a run lacks it or there is none."""
    given = list(values)
    numbers = [value for value in given if value is not None]
    if not numbers or len(numbers) < len(given):
        return None
    spread = (max(numbers) - min(numbers)) / 2 if len(numbers) > 1 else None
    return Summary(sum(numbers) / len(numbers), spread)
