"""Experts, routers and adapters: their order and weighting, against a plain PyTorch forward."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.conversion.tensors.upcycling import initial_router
from tests.conversion.helpers import assert_same_tensors, checkpoint_tensors, perturb, rewrite_checkpoint, run
from tests.conversion.reference_moe import PROJECTIONS, PlainExperts, dense_expert, random_experts
from tests.conversion.tiny_models import load_model, logits, make_model

Dense = Callable[[str], Path]
MEGATRON_NAMES = dict(
    zip(PROJECTIONS, ("linear_fc1.weight_w", "linear_fc1.weight_v", "linear_fc2.weight"), strict=True)
)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("top_k", [2, 3])
def test_trained_experts_compute_the_same_after_export(
    name: str, top_k: int, dense_directory: Dense, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    run("import", "--hf", dense_directory(name), "--save", checkpoint, "--num-experts", 5, "--top-k", top_k)
    rewrite_checkpoint(checkpoint, perturb)
    run("export", "--load", checkpoint, "--hf", tmp_path / "moe")

    model, tensors = make_model(name), checkpoint_tensors(checkpoint)
    for layer, block in enumerate(model.model.layers):
        mlp = f"decoder.layers.{layer}.mlp"
        places = [f"{mlp}.original_expert", *(f"{mlp}.experts.experts.{index}" for index in range(4))]
        experts = [{name: tensors[f"{place}.{key}"] for name, key in MEGATRON_NAMES.items()} for place in places]
        assert torch.equal(experts[0]["up_proj"], block.mlp.up_proj.weight)
        block.mlp = PlainExperts(tensors[f"{mlp}.router.weight"], experts, top_k)
    expected = logits(model)
    assert (expected - logits(make_model(name))).abs().max() > 0.1  # the perturbation matters
    assert (logits(load_model(tmp_path / "moe")) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["qwen2", "qwen3-tied", "llama"])
def test_adapter_over_its_base(name: str, dense_directory: Dense, tmp_path: Path) -> None:
    layers = [0, 1, 2] if name == "llama" else [0, 2]
    model = make_model(name)
    write_adapter(tmp_path / "adapter", model, layers)
    base = dense_directory(name)
    run("import", "--hf", base, "--adapter", tmp_path / "adapter", "--save", tmp_path / "checkpoint")
    card = resolve_checkpoint(tmp_path / "checkpoint").card()
    assert card.experts_per_layer == [4 if layer in layers else 1 for layer in range(3)] and card.top_k == 2
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "moe")
    expected = logits(model)  # write_adapter has put the plain forward into it
    assert (expected - logits(make_model(name))).abs().max() > 0.1
    assert (logits(load_model(tmp_path / "moe")) - expected).abs().max() < 1e-4
    run("import", "--hf", tmp_path / "moe", "--save", tmp_path / "again")
    assert_same_tensors(checkpoint_tensors(tmp_path / "checkpoint"), checkpoint_tensors(tmp_path / "again"))


def write_adapter(directory: Path, model: torch.nn.Module, layers: list[int]) -> None:
    """Random experts and routers in the authors' form, and the same in `model` as a plain forward."""
    directory.mkdir()
    tensors = {}
    for layer in layers:
        new = random_experts(model, layer, 3, seed=layer)
        router = torch.randn(4, 32, generator=torch.Generator().manual_seed(100 + layer))
        prefix = f"base_model.model.model.layers.{layer}.mlp."
        tensors[prefix + "moe_router_embedding.weight"] = router
        for index, expert in enumerate(new):
            tensors.update({f"{prefix}moe_experts.{index}.{key}.weight": value for key, value in expert.items()})
        model.model.layers[layer].mlp = PlainExperts(router, [dense_expert(model, layer), *new], 2)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "MOE", "num_experts": 4, "topk": 2, "layers_to_transform": layers}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def test_upcycled_checkpoint_holds_copies_and_fresh_routers(dense_directory: Dense, tmp_path: Path) -> None:
    for save, seed in (("one", 1), ("same", 1), ("other", 2)):
        arguments = ("--num-experts", 3, "--seed", seed)
        run("import", "--hf", dense_directory("qwen2"), "--save", tmp_path / save, *arguments)
    one = checkpoint_tensors(tmp_path / "one")
    assert_same_tensors(one, checkpoint_tensors(tmp_path / "same"))
    for key, tensor in checkpoint_tensors(tmp_path / "other").items():
        assert torch.equal(tensor, one[key]) != (".router." in key), key
    mlp = "decoder.layers.1.mlp"
    for index in range(2):
        for part in MEGATRON_NAMES.values():
            assert torch.equal(one[f"{mlp}.experts.experts.{index}.{part}"], one[f"{mlp}.original_expert.{part}"])


def test_router_depends_on_seed_and_layer_alone_and_is_xavier_normal() -> None:
    router = initial_router(8, 4096, seed=3, layer=5)
    assert router.dtype == torch.float32 and router.shape == (8, 4096)
    assert torch.equal(router, initial_router(8, 4096, seed=3, layer=5))
    assert not torch.equal(router, initial_router(8, 4096, seed=3, layer=6))
    assert router.std().item() == pytest.approx((2 / (8 + 4096)) ** 0.5, rel=0.03)


def test_top_1_exports_unnormalised(dense_directory: Dense, tmp_path: Path) -> None:
    arguments = ("--num-experts", 3, "--top-k", 1, "--allow-top-1")
    run("import", "--hf", dense_directory("qwen3"), "--save", tmp_path / "checkpoint", *arguments)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "moe")
    assert load_model(tmp_path / "moe").config.norm_topk_prob is False
    run("import", "--hf", tmp_path / "moe", "--save", tmp_path / "again")
    assert_same_tensors(checkpoint_tensors(tmp_path / "checkpoint"), checkpoint_tensors(tmp_path / "again"))
