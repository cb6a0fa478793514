"""Mistakes on the command line end in one line."""

import ast
import dataclasses
from pathlib import Path

import pytest

from megatron_moe_lpr.command_line import parse_flags
from tests.evaluation.tools import load_tool


@dataclasses.dataclass
class Flags:
    """Some flags."""

    load: str
    """Where from."""
    train_iters: int = 1
    """How long."""


def test_flags_are_parsed():
    assert parse_flags(Flags, ["--load", "x", "--train-iters", "3"]) == Flags("x", 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "missing --load"),
        (["--load", "x", "--train-iters", "many"], "--train-iters: invalid literal for int"),
        (["--load", "x", "--laod", "y"], "--laod"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(Flags, arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert words in error


def test_help_is_shown(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(Flags, ["--help"])
    assert stop.value.code == 0
    assert "How long." in capsys.readouterr().out


TOOLS = sorted((Path(__file__).parents[1] / "tools").glob("*.py"))


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_every_tool_says_mistakes_this_way(tool):
    """Without a start of each, some of which import for seconds: all call `parse_flags`, none tyro's own parser."""
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
