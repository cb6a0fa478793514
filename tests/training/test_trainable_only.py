"""Checkpoints of trained weights alone: with their base as good as a complete one, with another base refused."""

import functools
import json
import shutil

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.checkpoint.format.trainable_only import open_reader
from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.conversion.verification.frozen import fingerprint_of_checkpoint
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from tests.conversion.helpers import (
    assert_same_tensors,
    checkpoint_tensors,
    hf_tensors,
    perturb,
    rewrite_checkpoint,
    run,
)
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, rewind, train

EP2 = {"expert_model_parallel_size": 2, "use_distributed_optimizer": True}
TP2 = {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}
ONLY = {"save_trainable_only": True}


def run_pool(load, save, data, stage="1", **changes):
    return rank_pool(2).run(functools.partial(train, load, save, data, stage, **changes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Stage 1 and from it stage 2, saved whole and as what trains; every checkpoint where it was written."""
    root = tmp_path_factory.mktemp("runs")
    checkpoint, data = make_checkpoint(root), make_data(root)
    for name, extra in (("whole", {}), ("only", ONLY)):
        run_pool(checkpoint, root / name / "1", data, save_interval=3, **EP2, **extra)
        run_pool(root / name / "1", root / name / "2", data, "2", save_interval=3, **EP2, **extra)
    return root, checkpoint, data


def model_tensors(path) -> dict[str, torch.Tensor]:
    """The model's, without the rows that pad the vocabulary while it trains."""
    reader = open_reader(resolve_checkpoint(path))
    tensors = {key: reader.read(key) for key in reader.tensors if key.startswith(("decoder.", "embedding."))}
    return {key: tensor[:99] if key.startswith("embedding.") else tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("stage, kinds", [("1", ("router", "experts")), ("2", ("router",))])
def test_it_holds_what_trains_and_with_its_base_all(stage, kinds, runs):
    root = runs[0]
    own = checkpoint_tensors(root / "only" / stage)
    assert own and all(any(f".mlp.{kind}." in key for kind in kinds) for key in own)
    assert_same_tensors(model_tensors(root / "only" / stage), model_tensors(root / "whole" / stage))


def test_a_review_is_small(runs):
    """Four routers of 5 x 32 numbers, four times (weight, the optimizer's copy and moments); no expert."""
    root = runs[0]
    path = resolve_checkpoint(root / "only" / "2").path
    tensors = checkpoint_tensors(root / "only" / "2")
    assert sum(tensor.numel() for tensor in tensors.values()) == 4 * 4 * 5 * 32
    size = sum(file.stat().st_size for file in path.glob("*.distcp"))
    whole = sum(file.stat().st_size for file in resolve_checkpoint(root / "whole" / "2").path.glob("*.distcp"))
    assert size < whole / 5


@pytest.mark.parametrize("stage, layout", [("1", EP2), ("2", EP2), ("1", TP2)])
def test_resume(stage, layout, runs, tmp_path):
    """To the bit at the same layout, nearly at another one."""
    root, checkpoint, data = runs
    load = checkpoint if stage == "1" else root / "only" / "1"
    save = rewind(root / "only" / stage, tmp_path / "run", 3)
    run_pool(load, save, data, stage, **layout, **ONLY)
    found, expected = checkpoint_tensors(save), checkpoint_tensors(root / "only" / stage)
    if layout is EP2:
        assert_same_tensors(found, expected)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-5)


def test_commands_take_both(runs, tmp_path, capsys):
    root, checkpoint, _ = runs
    for name in ("whole", "only"):
        run("export", "--load", root / name / "2", "--hf", tmp_path / name)
    assert_same_tensors(hf_tensors(tmp_path / "only"), hf_tensors(tmp_path / "whole"))
    assert json.loads((tmp_path / "only" / "moe_lpr" / "card.json").read_text())["base"] is None
    run("inspect", root / "only" / "2")
    assert "only what was trained" in capsys.readouterr().out
    card = resolve_checkpoint(checkpoint).card()
    assert fingerprint_of_checkpoint(root / "only" / "2") == card.original_fingerprint


def weights(path) -> dict[str, torch.Tensor]:
    """On every rank of a pool: this rank's part of a model, filled as evaluation and verification do."""
    layout = ParallelLayout(expert_model_parallel_size=2)
    platform = select_platform("cpu")
    initialize_parallel(platform, layout)
    model = unwrap(load_model(path, layout, platform).chunks[0])
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_loading_fills_the_model_from_both(runs):
    root = runs[0]
    for found, expected in zip(
        rank_pool(2).run(weights, root / "only" / "2"), rank_pool(2).run(weights, root / "whole" / "2"), strict=True
    ):
        assert_same_tensors(found, expected)


@pytest.fixture
def moved(runs, tmp_path):
    """Copies of stage 2's checkpoint and of its base, and the recorded path names nothing."""
    root = runs[0]
    shutil.copytree(root / "only" / "2", tmp_path / "review")
    shutil.copytree(root / "only" / "1", tmp_path / "base")
    side = resolve_checkpoint(tmp_path / "review").side_directory
    card = json.loads((side / "card.json").read_text())
    card["base"]["path"] = str(tmp_path / "gone")
    (side / "card.json").write_text(json.dumps(card))
    # The card is not what it was when its checksum was made.
    (side / "checksums.json").unlink()
    return tmp_path


def test_a_base_that_moved_is_named_by_a_flag(moved, runs, capsys):
    arguments = ("export", "--load", moved / "review", "--hf", moved / "hf")
    with pytest.raises(SystemExit):
        run(*arguments)
    error = capsys.readouterr().err
    assert "gone" in error and "--base-checkpoint" in error and not (moved / "hf").exists()
    run(*arguments, "--base-checkpoint", moved / "base")
    run("export", "--load", runs[0] / "whole" / "2", "--hf", moved / "whole")
    assert_same_tensors(hf_tensors(moved / "hf"), hf_tensors(moved / "whole"))


def test_another_base_is_refused(moved, runs, tmp_path, capsys):
    """Of another dense model; of the same, but with other new experts; complete ones need none."""
    root = runs[0]
    other = make_checkpoint(tmp_path / "other", model="qwen2")
    for base, words in (
        (other, "original weights are others"),
        (root / "whole" / "1", "weights are others (checksum)"),
    ):
        with pytest.raises(SystemExit):
            run("export", "--load", moved / "review", "--hf", moved / "hf", "--base-checkpoint", base)
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("export", "--load", root / "whole" / "1", "--hf", moved / "hf", "--base-checkpoint", other)
    assert "holds all weights" in capsys.readouterr().err


def test_a_converted_base_may_be_converted_again(runs, tmp_path, capsys):
    """Stage 1's checkpoint has all experts and routers: only the original weights count, and their fingerprint."""
    root, checkpoint, _ = runs
    again = shutil.copytree(checkpoint, tmp_path / "again")
    rewrite_checkpoint(again, perturb)
    (resolve_checkpoint(again).side_directory / "checksums.json").unlink(missing_ok=True)
    arguments = ("export", "--load", root / "only" / "1", "--base-checkpoint", again)
    run(*arguments, "--hf", tmp_path / "hf")
    run("export", "--load", root / "whole" / "1", "--hf", tmp_path / "whole")
    assert_same_tensors(hf_tensors(tmp_path / "hf"), hf_tensors(tmp_path / "whole"))


def test_everything_trains_in_full(runs, tmp_path):
    _, checkpoint, data = runs
    with pytest.raises(AssertionError, match="--save-trainable-only: with --stage full every weight trains"):
        run_pool(checkpoint, tmp_path / "run", data, "full", **ONLY)
