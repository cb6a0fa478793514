"""The commands that README and docs show: their flags are the tools' own."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from megatron_moe_lpr import command_line
from megatron_moe_lpr.training.config import TrainingConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINING = "megatron_moe_lpr.pretrain"


class Parsed(Exception):
    """The flags are right, and that is all that is asked."""


def commands() -> list[tuple[str, list[str]]]:
    """(tool or module, its arguments) of every command in a code block, lines put together."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else []
                if TRAINING in words:
                    found.append((TRAINING, words[words.index(TRAINING) + 1 :]))
                elif len(words) > 1 and words[0] == "python" and words[1].startswith("tools/"):
                    found.append((words[1], words[2:]))
    return found


@pytest.mark.parametrize(("tool", "arguments"), commands())
def test_flags_of_a_shown_command(tool, arguments, monkeypatch):
    """Parsed as the tool parses them, and no further."""

    if tool == TRAINING:
        # Its main installs handlers of signals.
        assert command_line.parse_flags(TrainingConfig, arguments).stage
        return
    original = command_line.parse_flags

    def parse(kind, given=None, description=None):
        original(kind, arguments, description)
        raise Parsed

    monkeypatch.setattr(command_line, "parse_flags", parse)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / tool), run_name="__main__")


def test_there_are_such_commands():
    assert {"tools/convert_hf.py", "tools/inspect_data.py", "tools/preprocess_data.py", TRAINING} <= {
        tool for tool, _ in commands()
    }
