"""Transformer Engine's layers construct, and one checkpoint fits both specifications, bit for bit."""

import pytest
import torch

from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from tests.conversion.helpers import perturb, rewrite_checkpoint, run
from tests.conversion.tiny_models import MODELS, save_model
from tests.transformer_engine import models
from tests.transformer_engine.ranks import ranks

RECIPES = {"delayed": "TEDelayedScaling", "tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}
WITH_TE = {
    "self_attention.linear_qkv": "TELayerNormColumnParallelLinear",
    "self_attention.linear_proj": "TERowParallelLinear",
    "self_attention.core_attention": "TEDotProductAttention",
    "mlp": "MoELPRLayer",
    "mlp.router": "LPRRouter",
    "mlp.experts": "TEGroupedMLP",
    "mlp.experts.linear_fc1": "TEColumnParallelExperts",
    "mlp.experts.linear_fc2": "TERowParallelExperts",
    "mlp.original_expert.linear_fc1": "TEColumnParallelLinear",
    "mlp.original_expert.linear_fc2": "TERowParallelLinear",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function from a tiny model's name to its upcycled checkpoint with five different experts a layer."""
    known = {}

    def get(name: str):
        if name not in known:
            root = tmp_path_factory.mktemp("checkpoints")
            save_model(name, root / "hf", torch.bfloat16)
            run("import", "--hf", root / "hf", "--save", root / "moe", "--num-experts", 5)
            rewrite_checkpoint(root / "moe", perturb)
            known[name] = root / "moe"
        return known[name]

    return get


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    differing = [key for key, tensor in first.items() if not torch.equal(tensor, second[key])]
    assert not differing


@pytest.mark.parametrize("name", MODELS)
def test_every_family_constructs(name, checkpoint):
    found = ranks(True, 1).run(models.construct, checkpoint(name), FP8Options())[0]
    assert {part: found[part] for part in WITH_TE} == WITH_TE


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("format", ["hybrid", "e4m3"])
def test_every_recipe_is_entered(recipe, format, checkpoint):
    """mxfp8 needs a Blackwell device, and the device made up here is a Hopper one."""
    found = ranks(True, 1).run(models.construct, checkpoint("qwen2"), FP8Options(format, recipe))[0]
    assert (found["recipe"], found["entered"]) == (RECIPES[recipe], "True")
    assert {part: found[part] for part in WITH_TE} == WITH_TE


def test_fp8_parameters_begin_with_the_new_experts(checkpoint):
    """Attention is built before them and the original expert after; of these only the new experts may be rounded."""
    gather = FP8Options("hybrid", "tensorwise", fp8_param_gather=True)
    message = ranks(True, 1).run(models.first_fp8_parameter, checkpoint("qwen2"), gather)[0]
    assert "is a CUDA kernel" in message
    assert "GroupedLinear" in message or "TEGroupedMLP" in message
    assert "SelfAttention" not in message


@pytest.mark.parametrize("name", MODELS)
def test_converted_checkpoint_fills_both_specifications_alike(name, checkpoint):
    """Every parameter was spoilt before loading: none that the checkpoint does not fill could agree."""
    local, engine = (ranks(kind, 1).run(models.parameters, checkpoint(name))[0] for kind in (False, True))
    assert_same(local, engine)
    assert not any((tensor == models.NEVER_A_WEIGHT).any() for tensor in engine.values())


@pytest.mark.parametrize("writer", [False, True], ids=["local to TE", "TE to local"])
@pytest.mark.parametrize(("written_at", "read_at"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_saved_by_one_specification_fills_the_other(writer, written_at, read_at, checkpoint, tmp_path):
    original, saved = checkpoint("qwen3"), tmp_path / "saved"
    ranks(writer, written_at).run(models.save_again, original, saved, written_at)
    found = ranks(not writer, read_at).run(models.parameters, saved, read_at)
    expected = ranks(not writer, read_at).run(models.parameters, original, read_at)
    for rank in range(read_at):
        assert_same(found[rank], expected[rank])


def test_only_extra_states_are_missing(checkpoint):
    """Of all that the TE specification asks for, the converted checkpoint lacks `_extra_state` entries alone."""
    differing = ranks(True, 1).run(models.differing_keys, checkpoint("llama"))[0]
    assert differing
    assert all("_extra_state" in key for key in differing)
    local = ranks(False, 1).run(models.differing_keys, checkpoint("llama"))[0]
    assert all("_extra_state" in key for key in local)


@pytest.mark.parametrize("stage", ["1", "2", "full"])
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3", "mistral"])
def test_same_parameters_train(stage, name, checkpoint):
    local, engine = (
        ranks(kind, 1).run(models.trainable_and_frozen, checkpoint(name), stage)[0] for kind in (False, True)
    )
    assert local == engine
    trainable, frozen = engine
    assert len([key for key in trainable if ".experts." in key]) == (0 if stage == "2" else 3 * 4 * 2)
    assert bool(frozen) == (stage != "full")
