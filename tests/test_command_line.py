"""A wrong command line ends in one line."""

import ast
import dataclasses
from pathlib import Path

import pytest
import tyro

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError
from tests.evaluation.tools import load_tool


@dataclasses.dataclass
class Flags:
    """Some flags."""

    load: str
    """Where from."""
    train_iters: int = 1
    """How long."""

    def __post_init__(self) -> None:
        if self.train_iters < 0:
            raise UserError(f"--train-iters {self.train_iters}: at least 0")


def test_flags_are_parsed():
    assert parse_flags(Flags, ["--load", "x", "--train-iters", "3"]) == Flags("x", 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "missing --load"),
        (["--load", "x", "--train-iters", "many"], "--train-iters: invalid literal for int"),
        (["--load", "x", "--laod", "y"], "--laod"),
        (["--load", "x", "--train-iters", "-1"], "--train-iters -1: at least 0"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(Flags, arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert words in error


@dataclasses.dataclass
class Place:
    """A value without a flag."""

    directory: tyro.conf.Positional[str]
    """Where from."""


@pytest.mark.parametrize(
    ("arguments", "words"), [([], "missing STR"), (["--laod"], "Missing value for argument 'directory'")]
)
def test_missing_values_without_a_flag_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(Place, arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") and error.count("\n") == 1


def test_help_is_shown(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(Flags, ["--help"])
    assert stop.value.code == 0
    assert "How long." in capsys.readouterr().out


ROOT = Path(__file__).parents[1]
TOOLS = sorted((ROOT / "megatron_moe_lpr" / "commands").glob("[a-z]*.py"))
DEMO = sorted(path for path in (ROOT / "examples" / "demo").glob("*.py") if "def main(" in path.read_text())


@pytest.mark.parametrize("tool", [*TOOLS, *DEMO], ids=lambda path: path.stem)
def test_every_tool_says_mistakes_this_way(tool):
    """Checked in the source, since some tools take seconds to start: all call `parse_flags`, none tyro's own parser."""
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(tool.read_text())) if isinstance(node, ast.Call)]
    assert "parse_flags" in calls and "tyro.cli" not in calls


@pytest.mark.parametrize(
    ("tool", "missing"), [("evaluate", "--load, --valid-data-path"), ("report", "--evaluation"), ("plan", "--gpus")]
)
def test_mistakes_of_the_tools_that_showed_a_box(tool, missing, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [tool])
    with pytest.raises(SystemExit) as stop:
        load_tool(tool).main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: missing {missing}") and error.count("\n") == 1
