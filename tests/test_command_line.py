"""Mistakes on the command line end in one line."""

import dataclasses

import pytest

from megatron_moe_lpr.command_line import parse_flags


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
