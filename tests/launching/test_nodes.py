"""MIN_NODES of the example scripts: how many of a job's nodes train."""

import os
import re
import subprocess

import pytest

from examples import train
from examples.train import Machine, check_memory, use_nodes
from megatron_moe_lpr.errors import UserError
from tests.launching.builders import ROOT, environment, fake_python
from tests.training.runs import training_config


@pytest.fixture
def config(tmp_path):
    """A run whose global batch 1, 2 or 4 ranks divide."""
    return training_config(tmp_path, tmp_path, dict.fromkeys(("el", "hu"), "x"), global_batch_size=8)


def nodes(number: int, ranks: int = 1) -> Machine:
    return Machine("cpu", ranks, number, "80")


@pytest.mark.parametrize(("given", "least", "used"), [(1, 1, 1), (2, 1, 2), (3, 1, 2), (3, 2, 2), (4, 2, 4), (9, 1, 4)])
def test_the_most_nodes_that_fit_train(config, given, least, used, capsys):
    assert use_nodes(config, nodes(given), least) == nodes(used)
    said = capsys.readouterr().out
    assert (f"note: {used} of {given} nodes train" in said) == (used < given)
    assert ("--global-batch-size 8 is not a multiple" in said) == (used < given)


@pytest.mark.parametrize(
    ("given", "least", "words"),
    [
        (1, 2, "MIN_NODES=2: more than the number of nodes, 1; submit with --nodes=2-MOST"),
        (4, 3, "MIN_NODES=3: --global-batch-size 8 is not a multiple of"),
        (4, 3, "numbers of nodes that fit: 1, 2, 4"),
    ],
)
def test_a_min_nodes_that_cannot_be_is_one_line(config, given, least, words):
    with pytest.raises(UserError, match=re.escape(words)):
        use_nodes(config, nodes(given), least)


def test_the_fewest_nodes_must_hold_the_run(config, monkeypatch):
    """Otherwise the job would end when a node has died, not when it is submitted."""
    asked = []

    def plan(config, machine):
        asked.append(machine)
        return ["bash", "-c", "echo layout; echo 'error: 8 x 80 GiB: no layout fits' >&2; exit 1"]

    monkeypatch.setattr(train, "plan_command", plan)
    with pytest.raises(UserError, match="MIN_NODES=1: 8 x 80 GiB: no layout fits; give a larger MIN_NODES"):
        check_memory(config, nodes(2, 8), 1)
    assert asked == [nodes(1, 8)]
    monkeypatch.setattr(train, "plan_command", lambda config, machine: ["true"])
    check_memory(config, nodes(2, 8), 1)


def test_a_batch_job_starts_the_nodes_that_train(tmp_path):
    for name, text in {
        "scontrol": 'echo "NodeName=n1 NodeAddr=127.0.0.1 Arch=x"',
        "srun": 'printf "%s " "$NUM_NODES" "$@" >"$RECORD"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "load").mkdir()
    for name in ("train-el", "valid-el", "valid-en"):
        (tmp_path / f"{name}.idx").touch()
    slurm = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NNODES": 3}
    own = {"PYTHON": fake_python(tmp_path, "true"), "LOAD": tmp_path / "load", "DATA": tmp_path, "MIN_NODES": 2}
    settings = environment(tmp_path, **own, **slurm, SAVE=tmp_path / "save", RECORD=tmp_path / "record")
    result = subprocess.run(
        ["bash", str(ROOT / "examples/slurm/train.sbatch"), "examples/stage1_qwen.sh"],
        cwd=ROOT,
        env={**settings, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "note: 2 of 3 nodes train" in result.stdout and "--nnodes 2 " in result.stdout
    started = (tmp_path / "record").read_text()
    assert started.startswith("2 ") and "--relative=0 --nodes=2 --ntasks=2 bash examples/stage1_qwen.sh" in started
