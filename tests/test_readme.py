"""The commands that README and docs show: their flags are the commands' own."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from megatron_moe_lpr import cli, command_line
from megatron_moe_lpr.launch import RANK_COMMANDS
from megatron_moe_lpr.training.configuration.config_file import parse_training_flags

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINING = "megatron_moe_lpr.pretrain"


class Parsed(Exception):
    """The flags are right, and that is all that is asked."""


def commands() -> list[tuple[str, list[str]]]:
    """(subcommand of moe-lpr, its arguments) of every command in a code block, lines put together."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else []
                if TRAINING in words:
                    found.append(("train", words[words.index(TRAINING) + 1 :]))
                elif words[:1] == ["moe-lpr"]:
                    found.append(shown_command(words[1:]))
    return found


def shown_command(words: list[str]) -> tuple[str, list[str]]:
    """What `launch` starts on its ranks stands for itself."""
    if words[0] == "launch":
        place = next(place for place, word in enumerate(words) if word in RANK_COMMANDS)
        words = words[place:]
    return words[0], words[1:]


@pytest.mark.parametrize(("name", "arguments"), [shown for shown in commands() if shown[0] != "COMMAND"])
def test_flags_of_a_shown_command(name, arguments, monkeypatch):
    """Parsed as the command parses them, and no further."""
    if name == "train":
        # Its main installs handlers of signals.
        assert parse_training_flags(arguments).stage
        return
    if set(arguments) <= {"--help"}:
        assert name in {one.name for one in cli.COMMANDS}
        return
    module = next(one.module for one in cli.COMMANDS if one.name == name)
    original = command_line.parse_flags

    def parse(kind, given=None, description=None):
        original(kind, given, description)
        raise Parsed

    monkeypatch.setattr(f"megatron_moe_lpr.{module}.parse_flags", parse)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(Parsed):
        importlib.import_module(f"megatron_moe_lpr.{module}").main(
            [name, *arguments] if module == "commands.convert" else arguments
        )


def test_there_are_such_commands():
    assert {"import", "inspect", "verify", "export", "preprocess", "inspect-data", "train"} <= {
        name for name, _ in commands()
    }
