"""A base model that is a mixture trains in FP8: its own experts, router rows and shared expert keep their bits."""

from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind, kind_of
from tests.conversion import tiny_models
from tests.conversion.helpers import checkpoint_tensors
from tests.gpu.ranks import run
from tests.gpu.test_families import mixture_checkpoint
from tests.gpu.test_numerics import BF16, RECIPES
from tests.training.runs import metrics, train

MOVES = {"1": {ParameterKind.NEW_EXPERTS, ParameterKind.ROUTER}, "2": {ParameterKind.ROUTER}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Qwen2-MoE of two layers with a shared expert, every dimension a multiple of 128."""
    model_type, fields = tiny_models.MIXTURES["qwen2_moe"]
    wider = fields | {"num_hidden_layers": 2, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.MIXTURES, "qwen2_moe", (model_type, wider))
        return mixture_checkpoint(tmp_path_factory.mktemp("mixture"), "qwen2_moe")


def moved(before: Path, after: Path) -> set[ParameterKind]:
    """Kinds of the model's tensors that differ."""
    old, new = checkpoint_tensors(before), checkpoint_tensors(after)
    model = {key: tensor for key, tensor in old.items() if not key.startswith("optimizer")}
    return {
        kind_of(key)
        for key, tensor in model.items()
        if not torch.equal(new[key][: len(tensor)].to(tensor.dtype), tensor[: len(new[key])])
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_both_stages_in_fp8(recipe, checkpoint, inputs, tmp_path):
    fields = {"platform": "cuda", "fp32": False, **BF16, **RECIPES[recipe], "lr": 3e-3, "seq_length": 32}
    fields |= {"micro_batch_size": 4, "global_batch_size": 4}
    load = checkpoint
    for stage, steps in (("1", 3), ("2", 2)):
        save = tmp_path / stage
        run(1, partial(train, stage=stage, train_iters=steps, **fields), load, save, inputs[1])
        assert moved(load, save) == MOVES[stage]
        load = save
    losses = metrics(tmp_path / "1")
    assert losses[3]["lm_loss"] < losses[1]["lm_loss"]
