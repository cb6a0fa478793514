"""The demo's driver: steps that run once, settings from the environment, several runs at the same time."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples" / "demo"))
import paper_table
from demo import TARGETS
from settings import Settings, read_settings
from workflow import Failed, Workflow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def flow(tmp_path) -> Workflow:
    return Workflow(Settings(runs=tmp_path / "runs", ranks=1, precision="--fp32"))


def test_a_step_runs_once_and_only_success_counts(flow, tmp_path, capsys):
    done, calls = tmp_path / "deep" / "done", []
    with pytest.raises(Failed) as failure:
        flow.step(done, "title", lambda: flow.python("-c", "raise SystemExit(7)"))
    assert failure.value.code == 7 and not done.exists()
    for _ in range(2):
        flow.step(done, "title", lambda: calls.append(1))
    assert calls == [1] and done.exists()
    assert "== title: done before, reusing it" in capsys.readouterr().out


def test_lines_of_runs_beside_each_other_carry_their_names(flow, capsys):
    flow.beside({name: lambda one: one.python("-c", "print('x')\nprint('y')") for name in ("seed 1", "seed 2")})
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == ["seed 1 | x", "seed 1 | y", "seed 2 | x", "seed 2 | y"]
    assert [line for line in lines if line.startswith("seed 1")] == ["seed 1 | x", "seed 1 | y"]
    with pytest.raises(Failed):
        flow.beside({"good": lambda one: None, "bad": lambda one: one.python("-c", "raise SystemExit(1)")})


def test_settings_of_the_environment_win_over_those_of_a_target(monkeypatch):
    for name in ("RUNS", "STAGE1_ITERS", "EXPANDED", "DATA"):
        monkeypatch.delenv(name, raising=False)
    assert read_settings(stage1_iters=7) == dataclasses.replace(Settings(), stage1_iters=7)
    for name, text in {"STAGE1_ITERS": "9", "EXPANDED": "el cs", "DATA": "d", "STAGE1_LR": "1e-4"}.items():
        monkeypatch.setenv(name, text)
    settings = read_settings(stage1_iters=7, runs=Path("r"))
    assert (settings.stage1_iters, settings.expanded, settings.datasets) == (9, ("el", "cs"), Path("d"))
    assert settings.stage1_lr == "1e-4" and settings.runs == Path("r")
    monkeypatch.setenv("STAGE1_ITERS", "many")
    with pytest.raises(SystemExit, match="many"):
        read_settings()


def test_every_row_of_the_paper_table_is_trained_after_what_it_starts_from():
    there = {"base", "more_blocks", "moe"}
    for training in paper_table.TABLE_TRAININGS:
        assert training.load in there
        there.add(training.name)
    rows = {row if isinstance(row, str) else row.name for _, row in paper_table.TABLE}
    assert rows == {training.name for training in paper_table.TABLE_TRAININGS} | {"lora"}


def test_make_starts_every_target():
    text = (ROOT / "examples" / "demo" / "demo.mk").read_text()
    assert {name for name in TARGETS if f"demo.py {name}\n" in text} == set(TARGETS) - {"report"}
    assert text.count("demo.py ") == len(TARGETS) - 1


def test_an_unknown_target_names_the_targets():
    command = [sys.executable, str(ROOT / "examples" / "demo" / "demo.py"), "no-such"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and all(name in done.stderr for name in TARGETS)
