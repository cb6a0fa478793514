"""What a changed flag means for a run that goes on, said in its type: `lr: Scheduled[NonNegativeFloat]`.

Every field of a run's dataclasses carries one mark, outermost in its type. From the marks follow what a checkpoint
records of its run and what --accept-changes takes (`training/configuration/description.py`). tyro and `flag_ranges`
ignore them.
"""

import dataclasses
import enum
import typing
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, get_args, get_origin

T = TypeVar("T")


class Change(enum.Enum):
    """What another value in a resumed run is, of a flag that decides numbers and is recorded under its own name."""

    ANOTHER_RUN = "another run: the optimizer's state or the place in the data would mean nothing"
    ACCEPTABLE = "refused, unless --accept-changes names the flag"
    SCHEDULE = "acceptable, and also what Megatron's optimizer_param_scheduler decides (--override-opt-param-scheduler)"


@dataclasses.dataclass(frozen=True)
class Free:
    """Of a flag that decides no number of the run and may change without a word."""

    reason: str


@dataclasses.dataclass(frozen=True)
class RecordedAs:
    """Of a flag that decides numbers through what the run makes of it, which is recorded instead."""

    name: str
    """Of the record, see `describe_run`."""
    acceptable: bool = False
    """Whether --accept-changes takes this name."""


Mark = Change | Free | RecordedAs
Decides = Annotated[T, Change.ANOTHER_RUN]
Acceptable = Annotated[T, Change.ACCEPTABLE]
Scheduled = Annotated[T, Change.SCHEDULE]


class MarkedFlag(typing.NamedTuple):
    """A flag, the dataclass that holds it, and its mark."""

    path: str
    """From the configuration to the field, with dots: `optimizer.lr`."""
    mark: Mark

    @property
    def name(self) -> str:
        """The flag with underscores."""
        return self.path.rpartition(".")[2]

    @property
    def recorded_as(self) -> str | None:
        """Name in the description of a run; None: it is free."""
        if isinstance(self.mark, Free):
            return None
        return self.mark.name if isinstance(self.mark, RecordedAs) else self.name

    @property
    def acceptable(self) -> bool:
        """Whether --accept-changes takes it."""
        if isinstance(self.mark, RecordedAs):
            return self.mark.acceptable
        return self.mark in (Change.ACCEPTABLE, Change.SCHEDULE)


def marked_flags(kind: type, path: str = "") -> Iterator[MarkedFlag]:
    """Yield every flag of a dataclass and of the dataclasses that it holds.

    Args:
        kind: a dataclass.
        path: from the whole configuration to it, with a dot behind.

    Raises:
        TypeError: naming a field whose type has no mark, or several.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        inner, marks = _marks(hints[field.name])
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from marked_flags(inner, f"{path}{field.name}.")
        elif len(marks) == 1:
            yield MarkedFlag(f"{path}{field.name}", marks[0])
        else:
            raise TypeError(
                f"{kind.__name__}.{field.name}: its type has {len(marks)} marks where one is expected: Decides[...], "
                "Acceptable[...], Scheduled[...], or Annotated[..., Free(reason)] (megatron_moe_lpr/flag_marks.py)"
            )


def _marks(annotation: Any) -> tuple[Any, list[Mark]]:
    """The type within an Annotated, and the marks on it."""
    if get_origin(annotation) is not Annotated:
        return annotation, []
    inner, *metadata = get_args(annotation)
    return inner, [mark for mark in metadata if isinstance(mark, Mark)]
