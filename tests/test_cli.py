"""The installed command: its subcommands, and how messages name them."""

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe_lpr import cli, program
from megatron_moe_lpr.errors import BROKEN_PIPE_CODE
from megatron_moe_lpr.launch import spell_out
from megatron_moe_lpr.program import SCRIPTS, command

ROOT = Path(__file__).parents[1]


def test_help_is_one_screen_that_names_every_command(capsys):
    cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 + 1 and max(map(len, lines)) <= 100
    shown = [match[1] for line in lines if (match := re.match(r"  ([a-z-]+)  ", line))]
    assert shown == [one.name for one in cli.COMMANDS]
    assert set(shown) == {*SCRIPTS, "train", "launch"}


def test_every_command_has_a_main():
    for one in cli.COMMANDS:
        assert callable(importlib.import_module(f"megatron_moe_lpr.{one.module}").main)


@pytest.mark.parametrize(("word", "advice"), [("improt", "did you mean import? "), ("zzz", "--help lists them")])
def test_an_unknown_command_is_one_line(word, advice, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([word])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and repr(word) in error and advice in error


@pytest.mark.parametrize("name", ["report", "import", "plan"])
def test_usage_and_mistakes_name_the_subcommand(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["anything"])
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert not stop.value.code and f"usage: moe-lpr {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--no-such-flag"])
    assert stop.value.code == 2 and "--no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("started_as", "expected"),
    [
        ("tools/evaluate.py", "tools/convert_hf.py import"),
        ("/clone/tools/evaluate.py", "/clone/tools/convert_hf.py import"),
        ("moe-lpr evaluate", "moe-lpr import"),
        ("/venv/bin/moe-lpr", "moe-lpr import"),
        ("/clone/megatron_moe_lpr/pretrain.py", "moe-lpr import"),
    ],
)
def test_messages_name_a_command_as_this_person_starts_it(started_as, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started_as])
    assert command("import") == expected


def test_every_command_that_a_message_names_exists():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "megatron_moe_lpr").rglob("*.py"))
    named = set(re.findall(r"\bcommand\(['\"]([a-z-]+)['\"]\)", source))
    assert named and named <= {*SCRIPTS, "train", "launch"}
    messages = re.findall(r"^.*(?:UserError|advice|hint).*tools/[a-z_]+\.py.*$", source, re.MULTILINE)
    assert messages == []


def test_every_script_is_there():
    assert {words.split()[0] for words in SCRIPTS.values()} == {path.name for path in (ROOT / "tools").glob("*.py")}


def test_the_package_installs_the_command():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=program.NAME)
    assert entry.load() is cli.main


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nproc-per-node", "2", "train", "--stage", "1"], ["--nproc-per-node", "2", "-m", "M", "--stage", "1"]),
        (["--nproc-per-node=2", "--standalone", "train"], ["--nproc-per-node=2", "--standalone", "-m", "M"]),
        # The value of a flag is no command, and what stands behind the script belongs to it.
        (["--log-dir", "train", "train", "--save", "train"], ["--log-dir", "train", "-m", "M", "--save", "train"]),
        (["-m", "M", "--save", "evaluate"], ["-m", "M", "--save", "evaluate"]),
        (["script.py", "train"], ["script.py", "train"]),
        (["--nproc-per-node", "2", "evaluate", "--load", "x"],
         ["--nproc-per-node", "2", "-m", "megatron_moe_lpr.commands.evaluate", "--load", "x"]),
        ([], []),
    ],
)  # fmt: skip
def test_ranks_are_started_by_the_name_of_their_command(arguments, expected):
    module = "megatron_moe_lpr.pretrain"
    found = [word if word != module else "M" for word in spell_out([module if w == "M" else w for w in arguments])]
    assert found == expected


def test_help_into_a_closed_pipe_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "megatron_moe_lpr.cli", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    os.close(writing)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE_CODE, "")
