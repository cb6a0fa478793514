"""Which numbers a flag takes, said in its type: `lr: NonNegativeFloat`. The names are pydantic's.

Imports nothing heavy, so that a number out of its range is told before torch is loaded.
"""

import dataclasses
import math
from typing import Annotated, Any, get_args, get_origin

from megatron_moe_lpr.errors import UserError

INT_MAX = 2**31 - 1
FLOAT_MAX = 3.4e38
"""Of float32, in which most numbers end."""
LONGEST_SHOWN = 30


@dataclasses.dataclass(frozen=True)
class Range:
    """From `low` to `high`; `above` and `below` say that these themselves are not in it."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def has(self, number: float) -> bool:
        """Whether a number lies in it; NaN lies in none."""
        return (self.low < number if self.above else self.low <= number) and (
            number < self.high if self.below else number <= self.high
        )

    def words(self, number: float) -> str:
        """What is asked of a number that is not in it; how large it may be is said of large ones only."""
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
"""What NumPy's generators take."""

ANY_INT = Range(-(2**63), 2**63 - 1)
ANY_FLOAT = Range(-FLOAT_MAX, FLOAT_MAX)


def check_ranges(flags: Any) -> None:
    """Check every number in a dataclass of flags, and in the dataclasses and lists that it holds.

    Raises:
        UserError: naming the flag, its value and what it takes.
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
    """What a field's annotation says of numbers: int or float, and their range; (None, None): it holds no numbers.

    Looks into unions, lists and tuples. bool and Literal are no numbers.
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
