"""Every flag of a run says in its type what a change of it means; one that does not is an error that names it."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import pytest

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.flag_marks import (
    Acceptable,
    Change,
    Decides,
    Free,
    MarkedFlag,
    RecordedAs,
    Scheduled,
    T,
    marked_flags,
)
from megatron_moe_lpr.flag_ranges import PositiveInt, Range, number_type
from megatron_moe_lpr.training.configuration.config import TrainingConfig

Place = Annotated[T, Free("a place")]


@dataclasses.dataclass(frozen=True)
class Inner:
    """Flags."""

    rate: Scheduled[Annotated[float, Range(0, 1)] | None] = None
    """A rate."""
    paths: Annotated[list[str], RecordedAs("data", acceptable=True)] = dataclasses.field(default_factory=list)
    """Some paths."""


@dataclasses.dataclass(frozen=True)
class Outer:
    """Flags."""

    inner: Annotated[Inner, "a word of tyro's"] = dataclasses.field(default_factory=Inner)
    steps: Decides[PositiveInt] = 1
    """Steps."""
    form: Acceptable[Literal["a", "b"]] = "a"
    """A form."""
    place: Place[Path | None] = None
    """A place."""


def test_marks_are_read_in_every_part():
    flags = {flag.path: flag for flag in marked_flags(Outer)}
    assert {path: flag.mark for path, flag in flags.items()} == {
        "inner.rate": Change.SCHEDULE,
        "inner.paths": RecordedAs("data", acceptable=True),
        "steps": Change.ANOTHER_RUN,
        "form": Change.ACCEPTABLE,
        "place": Free("a place"),
    }
    assert [flag.recorded_as for flag in flags.values()] == ["rate", "data", "steps", "form", None]
    assert [flag.acceptable for flag in flags.values()] == [True, True, False, True, False]


def test_marked_flags_are_parsed_and_in_their_ranges(capsys):
    assert parse_flags(
        Outer, ["--inner.rate", "0.5", "--inner.paths", "a", "b", "--form", "b", "--place", "x"]
    ) == Outer(Inner(0.5, ["a", "b"]), 1, "b", Path("x"))
    for words, message in (
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--inner.rate", "2"], "--rate 2.0: "),
    ):
        with pytest.raises(SystemExit):
            parse_flags(Outer, words)
        assert message in capsys.readouterr().err
    assert number_type(Scheduled[PositiveInt | None]) == number_type(PositiveInt)
    with pytest.raises(SystemExit):
        parse_flags(Outer, ["--help"])
    shown = capsys.readouterr().out
    assert "--form {a,b}" in shown and "Annotated" not in shown and "Change." not in shown


@pytest.mark.parametrize(
    ("annotation", "number"),
    [
        (int, 0),
        (PositiveInt, 0),
        (Decides[int] | None, 0),  # The mark is of a part of the type.
        (list[Decides[int]], 0),
        (Annotated[Decides[int], Free("both")], 2),
    ],
)
@pytest.mark.parametrize("part", [field.name for field in dataclasses.fields(TrainingConfig)])
def test_a_planted_field_without_its_one_mark_is_named(part, annotation, number):
    """In every dataclass of a run, and in the run itself."""
    kinds = {field.name: getattr(field.type, "__origin__", field.type) for field in dataclasses.fields(TrainingConfig)}
    kind = kinds[part]
    is_part = dataclasses.is_dataclass(kind)
    new = dataclasses.make_dataclass(
        "Planted",
        [("planted", annotation, dataclasses.field(default=None))],
        bases=(kind if is_part else TrainingConfig,),
        frozen=(kind if is_part else TrainingConfig).__dataclass_params__.frozen,
    )
    run = dataclasses.make_dataclass("Run", [(part, new)]) if is_part else new
    with pytest.raises(TypeError, match=f"Planted.planted: its type has {number} marks where one is expected"):
        list(marked_flags(run))


def test_every_flag_of_a_run_has_its_mark_and_every_free_one_a_reason():
    flags = list(marked_flags(TrainingConfig))
    assert len(flags) > 70 and MarkedFlag("optimizer.lr", Change.SCHEDULE) in flags
    assert all(flag.mark.reason for flag in flags if isinstance(flag.mark, Free))
