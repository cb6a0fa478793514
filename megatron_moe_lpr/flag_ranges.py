"""Types that bound the numbers of a flag: `lr: NonNegativeFloat`. The names are pydantic's.

The module imports nothing slow, so that a number out of its range is reported before torch is imported.
"""

import dataclasses
import math
from typing import Annotated, Any, get_args, get_origin

from megatron_moe_lpr.errors import UserError

INT_MAX = 2**31 - 1
FLOAT_MAX = 3.4e38
"""Largest float32, rounded down: most numbers end in that dtype."""
LONGEST_SHOWN = 30


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; with `above` without `low` itself, with `below` without `high`."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def has(self, number: float) -> bool:
        """Return whether a number lies in the range; NaN lies in none."""
        return (self.low < number if self.above else self.low <= number) and (
            number < self.high if self.below else number <= self.high
        )

    def words(self, number: float) -> str:
        """Return the requirement that `number` fails, such as `at least 1`; the upper bound only for large numbers."""
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        if self.high >= INT_MAX and number < self.high:
            return low
        high = f"{self.high:g}" if isinstance(self.high, float) else str(self.high)
        return f"{low} and {'below' if self.below else 'at most'} {high}"


PositiveInt = Annotated[int, Range(1, INT_MAX)]
NonNegativeInt = Annotated[int, Range(0, INT_MAX)]
PositiveFloat = Annotated[float, Range(0, FLOAT_MAX, above=True)]
NonNegativeFloat = Annotated[float, Range(0, FLOAT_MAX)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
"""Seeds that NumPy's generators accept."""

ANY_INT = Range(-(2**63), 2**63 - 1)
ANY_FLOAT = Range(-FLOAT_MAX, FLOAT_MAX)


def check_ranges(flags: Any) -> None:
    """Check every number in a dataclass of flags, and in the dataclasses and lists that it holds.

    Raises:
        UserError: a number is out of its flag's range.
    """
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
            continue
        kind, allowed = number_type(field.type)
        if kind is None:
            continue
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float):
                _check(f"--{field.name.replace('_', '-')}", number, allowed or (ANY_INT if kind is int else ANY_FLOAT))


def _check(flag: str, number: float, allowed: Range) -> None:
    if isinstance(number, float) and not math.isfinite(number):
        raise UserError(f"{flag} {number}: must be a finite number")
    if not allowed.has(number):
        text = str(number)
        text = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
        raise UserError(f"{flag} {text}: must be {allowed.words(number)}")


def number_type(annotation: Any) -> tuple[type | None, Range | None]:
    """Return int or float and the range for the numbers of a field; (None, None) where it holds no numbers.

    Unions, lists and tuples are searched. bool and Literal are no numbers.
    """
    if annotation in (int, float):
        return annotation, None
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        kind, allowed = number_type(inner)
        own = next((mark for mark in marks if isinstance(mark, Range)), None)
        return (kind, own or allowed) if kind else (None, None)
    for part in get_args(annotation):
        kind, allowed = number_type(part)
        if kind:
            return kind, allowed
    return None, None
