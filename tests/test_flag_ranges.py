"""Every number that a flag takes is in the range that its type says, or refused in a line that names the flag."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_ranges import INT_MAX, Range, check_ranges, number_type
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from tests.evaluation.tools import load_tool

ROOT = Path(__file__).parents[1]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
SUB_COMMANDS = {"convert_hf": ("Import", "Expand", "Export", "Verify", "Inspect")}
KINDS = {"pretrain": TrainingConfig} | {
    f"{tool} {name}": getattr(load_tool(tool), name) for tool in TOOLS for name in SUB_COMMANDS.get(tool, ("Flags",))
}

BAD = (-1, 0, 1, 2**31, 2**63, 10**40, -(10**40), math.nan, math.inf, -math.inf, -0.5, -1e-300, 1e-300, 1e300)


def numeric_fields(kind: type, path: str = "") -> list[tuple[str, type, Range | None]]:
    """Flag, kind and range of every number in a dataclass of flags and in those that it holds."""
    found = []
    for field in dataclasses.fields(kind):
        inner = getattr(field.type, "__origin__", field.type)
        if dataclasses.is_dataclass(inner):
            found += numeric_fields(inner)
            continue
        number, allowed = number_type(field.type)
        if number:
            found.append((field.name, number, allowed))
    return found


FIELDS = [(name, *field) for name, kind in KINDS.items() for field in numeric_fields(kind)]


def test_there_are_numbers_in_every_part_of_a_training():
    names = {field for command, field, *_ in FIELDS if command == "pretrain"}
    assert {"lr", "train_iters", "seed", "save_interval", "eval_iters", "tensor_model_parallel_size"} <= names
    assert {"lpr_loss_coeff", "num_layers_at_end_in_bf16", "num_workers", "max_consecutive_skips"} <= names


@pytest.mark.parametrize(("command", "name", "kind", "allowed"), FIELDS, ids=lambda value: str(value)[:40])
def test_every_number_says_its_range(command, name, kind, allowed):
    """A new flag fails here until its type says what it takes, in place of `int` or `float`."""
    assert allowed is not None, f"{command} --{name.replace('_', '-')}"
    assert allowed.low > -math.inf and allowed.high < math.inf
    assert kind is float or allowed.high < 2**63  # what tensors and arrays hold


@dataclasses.dataclass
class Given:
    """Anything."""

    value: float | None
    """A number."""


@pytest.mark.parametrize(("command", "name", "kind", "allowed"), FIELDS, ids=lambda value: str(value)[:40])
def test_what_is_out_of_range_is_one_line_that_names_the_flag(command, name, kind, allowed):
    holder = dataclasses.make_dataclass("Holder", [(name, Annotated[kind, allowed])])
    for number in BAD:
        if kind is int and isinstance(number, float):
            continue  # tyro refuses it
        inside = math.isfinite(number) and allowed.low <= number <= allowed.high
        inside = (
            inside and not (allowed.above and number == allowed.low) and not (allowed.below and number == allowed.high)
        )
        if inside:
            check_ranges(holder(number))
            continue
        with pytest.raises(UserError) as refused:
            check_ranges(holder(number))
        said = str(refused.value)
        assert said.startswith(f"--{name.replace('_', '-')} ") and "must be" in said and len(said) < 200


@given(low=st.floats(-1e9, 1e9), width=st.floats(0, 1e9), number=st.floats() | st.integers())
def test_a_range_has_what_lies_between_its_ends(low, width, number):
    allowed = Range(low, low + width)
    between = not math.isnan(number) and low <= number <= low + width
    assert allowed.has(number) == between
    if not between:
        assert re.match("(at least|above) ", allowed.words(number))


@dataclasses.dataclass(frozen=True)
class Inner:
    """A part."""

    counts: tuple[Annotated[int, Range(0, INT_MAX)], ...] = ()
    """Some counts."""
    share: Annotated[float, Range(0, 1, above=True)] | None = None
    """A share."""


@dataclasses.dataclass(frozen=True)
class Outer:
    """Flags."""

    inner: Inner = dataclasses.field(default_factory=Inner)
    plain: float = 0.0
    """No range of its own."""
    quick: bool = True
    """No number."""
    word: Literal["1", "2"] = "1"
    """No number."""


def test_unions_lists_and_parts_are_looked_into():
    assert number_type(tuple[Annotated[int, Range(1, 2)], ...]) == (int, Range(1, 2))
    assert number_type(Annotated[Annotated[int, Range(1, 2)], "text"] | None) == (int, Range(1, 2))
    assert number_type(bool) == number_type(Literal["1"]) == number_type(Path | None) == (None, None)
    check_ranges(Outer(Inner((0, 5), 1.0), 3.0))
    for wrong, words in (
        (Outer(Inner((0, -5))), "--counts -5"),
        (Outer(Inner((), 0.0)), "--share 0.0: must be above 0"),
    ):
        with pytest.raises(UserError, match=words):
            check_ranges(wrong)
    with pytest.raises(UserError, match="--plain nan: must be a finite number"):
        check_ranges(Outer(plain=math.nan))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plain", "nan"], "--plain nan: must be a finite number"),
        (["--inner.share", "0"], "--share 0.0: must be above 0 and at most 1"),
        (["--inner.counts", "1", "-2"], "--counts -2: must be at least 0"),
    ],
)
def test_parse_flags_checks_them(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(Outer, arguments)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {words}\n"


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("plan", ["--gpus", "0"], "--gpus 0: must be at least 1"),
        ("plan", ["--gpus", "1", "--utilization", "nan"], "--utilization nan"),
        ("plan", ["--gpus", "1", "--utilization", "0"], "--utilization 0.0: must be above 0"),
        ("plan", ["--gpus", "1", "--original-share", "1.5"], "--original-share 1.5: must be at least 0 and at most 1"),
        (
            "merge_datasets",
            ["--input", "a", "--output-prefix", "b", "--shuffle-seed", "4294967296"],
            "--shuffle-seed 4",
        ),
        (
            "preprocess_data",
            ["--input", "a", "--output-prefix", "b", "--tokenizer", "c", "--workers", "0"],
            "--workers 0",
        ),
        ("merge_datasets", ["--input", "a", "--output-prefix", "b", "--shuffle-seed", "-1"], "--shuffle-seed -1"),
        ("build_index", ["--seq-length", "8", "--train-samples", "0"], "--train-samples 0"),
        ("evaluate", ["--load", "a", "--valid-data-path", "b", "--micro-batch-size", "0"], "--micro-batch-size 0"),
        ("inspect_data", ["--input", "a", "--documents", "-1"], "--documents -1"),
        ("download_data", ["--languages", "el", "--output", "a", "--shards", "-1"], "--shards -1"),
        (
            "allocate_experts",
            ["--load", "a", "--data-path", "b", "--original-languages", "en", "--budget", "0"],
            "--budget 0",
        ),
    ],
)
def test_tools_end_in_one_line(tool, arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [tool, *arguments])
    with pytest.raises(SystemExit) as stop:
        load_tool(tool).main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {words}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["import", "--hf", "a", "--save", "b", "--num-experts", "0"], "--num-experts 0"),
        (["import", "--hf", "a", "--save", "b", "--seed", "-1"], "--seed -1"),
        (["verify", "--hf", "a", "--load", "b", "--tolerance", "nan"], "--tolerance nan"),
        (["expand", "--load", "a", "--save", "b", "--add-experts", "1", "--seed", str(2**32)], f"--seed {2**32}"),
    ],
)
def test_conversions_end_in_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        load_tool("convert_hf").main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {words}") and error.count("\n") == 1
