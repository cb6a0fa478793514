"""A flipped byte in any file of a checkpoint: every command says so, and a run goes on from the checkpoint before."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.files.checksums import MANIFEST
from tests.conversion.helpers import checkpoint_tensors, run
from tests.distributed import rank_pool
from tests.training.outcomes import evaluation_outcome, train_outcome
from tests.training.runs import make_checkpoint, make_data

FILES = (
    "__0_0.distcp",
    "__1_0.distcp",
    ".metadata",
    "common.pt",
    "metadata.json",
    "moe_lpr/card.json",
    "moe_lpr/config.json",
    "moe_lpr/checksums.json",
)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    # A digit or letter in the small files: a flip that leaves JSON valid is the dangerous one.
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A finished run of two checkpoints on two ranks."""
    root = tmp_path_factory.mktemp("damage")
    load, data = make_checkpoint(root), make_data(root)
    save = root / "run"
    changes = {"train_iters": 4, "save_interval": 2}
    assert rank_pool(2).run(functools.partial(train_outcome, load, save, data, **changes)) == [None, None]
    return load, data, save, changes


def error_of(*arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 1
    return ""


def resume(setting, save: Path, **options) -> list[str | None]:
    load, data, _, changes = setting
    return rank_pool(2).run(functools.partial(train_outcome, load, save, data, **(changes | options)))


def test_every_file_is_in_the_manifest(setting):
    iteration = setting[2] / "iter_0000004"
    listed = json.loads((iteration / MANIFEST).read_text())["files"]
    there = {path.relative_to(iteration).as_posix() for path in iteration.rglob("*") if path.is_file()}
    assert there == listed.keys() | {MANIFEST.as_posix()}


@pytest.mark.parametrize("name", FILES)
def test_a_flip_is_found_by_every_command(name, setting, tmp_path, capsys):
    _, data, save, _ = setting
    broken = tmp_path / "run"
    shutil.copytree(save, broken)
    iteration = broken / "iter_0000004"
    flip(iteration / name)
    for outcomes in (
        rank_pool(2).run(functools.partial(train_outcome, broken, tmp_path / "new", data)),
        rank_pool(2).run(evaluation_outcome, iteration, data),
    ):
        assert outcomes[0] == outcomes[1], outcomes
        assert name.rpartition("/")[2] in outcomes[0]
    error_of("export", "--load", broken, "--hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    error_of("inspect", iteration, "--verify")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all(name.rpartition("/")[2] in line for line in errors)


def test_the_checkpoint_before_is_taken(setting, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(setting[2], broken)
    flip(broken / "iter_0000004" / "__1_0.distcp")
    refused = resume(setting, broken, fall_back=False)
    assert refused[0] == refused[1] and "__1_0.distcp: damaged" in refused[0] and "--no-fall-back" in refused[0]
    assert resume(setting, broken) == [None, None]
    assert (broken / "damaged-iter_0000004" / "__1_0.distcp").exists()
    expected, found = checkpoint_tensors(setting[2]), checkpoint_tensors(broken)
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_no_checkpoint_before(setting, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(setting[2], broken)
    shutil.rmtree(broken / "iter_0000002")
    flip(broken / "iter_0000004" / "moe_lpr" / "card.json")
    outcomes = resume(setting, broken)
    assert outcomes[0] == outcomes[1] and "holds no older checkpoint" in outcomes[0]
    assert (broken / "iter_0000004").is_dir()


def test_no_verify_and_checkpoints_without_checksums(setting, tmp_path, capfd):
    _, data, save, _ = setting
    old = tmp_path / "run"
    shutil.copytree(save, old)
    (old / "iter_0000004" / MANIFEST).unlink()
    run("inspect", old, "--verify")
    assert "used without verification" in capfd.readouterr().err
    assert resume(setting, old, train_iters=4) == [None, None]
    assert rank_pool(2).run(evaluation_outcome, old, data) == [None, None]
    shutil.rmtree(old)
    shutil.copytree(save, old)
    # Of a weight's own bytes: with the check skipped it is used.
    flip(old / "iter_0000004" / "__0_0.distcp")
    assert rank_pool(2).run(evaluation_outcome, old, data, False) == [None, None]
