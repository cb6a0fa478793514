"""Megatron's logits against transformers', for every family, from one checkpoint at every layout."""

from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.model.forward import compute_logits
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from tests.conversion.helpers import perturb, rewrite_checkpoint, run
from tests.conversion.tiny_models import COMMON, MODELS, make_model, save_model
from tests.conversion.tiny_models import load_model as load_hf
from tests.distributed import rank_pool

TOLERANCE = 1e-4

LAYOUTS = {
    "TP2+SP": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2 interleaved": (2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "TP2+SP, expert TP2": (2, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    "TP2xPP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "TP2xEP2": (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
}


def tokens() -> torch.Tensor:
    return torch.randint(0, COMMON["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(1))


def megatron_logits(path: Path, fields: dict) -> torch.Tensor:
    """On every rank: load at this layout, one forward."""
    platform, layout = select_platform("cpu"), ParallelLayout(**fields)
    initialize_parallel(platform, layout)
    model = load_model(path, layout, platform)
    with torch.no_grad():
        return compute_logits(model.chunks, model.config, tokens(), COMMON["vocab_size"])


@torch.no_grad()
def hf_logits(model) -> torch.Tensor:
    return model(tokens()).logits.float()


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).abs().max().item()


@pytest.fixture(scope="module")
def four_layer_models(tmp_path_factory):
    """Dense directory, dense checkpoint and upcycled checkpoint of every family; 4 layers, so that pipelines divide."""
    made = {}

    def get(name: str) -> dict[str, Path]:
        if name not in made:
            root = tmp_path_factory.mktemp("parity") / name
            save_model(name, root / "hf")
            run("import", "--hf", root / "hf", "--save", root / "dense", "--num-experts", 1)
            run("import", "--hf", root / "hf", "--save", root / "moe", "--num-experts", 5)
            run("import", "--hf", root / "hf", "--save", root / "trained", "--num-experts", 5)
            rewrite_checkpoint(root / "trained", perturb)
            made[name] = {part: root / part for part in ("hf", "dense", "moe", "trained")}
        return made[name]

    return get


@pytest.fixture(autouse=True, scope="module")
def _four_layers():
    before = COMMON["num_hidden_layers"]
    COMMON["num_hidden_layers"] = 4
    yield
    COMMON["num_hidden_layers"] = before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_one_process_equals_transformers(name, kind, four_layer_models, cpu_platform):
    paths = four_layer_models(name)
    difference = largest_difference(megatron_logits(paths[kind], {}), hf_logits(make_model(name)))
    assert difference < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_perturbed_experts_equal_transformers_stock_class(name, four_layer_models, cpu_platform, tmp_path):
    paths = four_layer_models(name)
    run("export", "--load", paths["trained"], "--hf", tmp_path / "hf")
    ours, theirs = megatron_logits(paths["trained"], {}), hf_logits(load_hf(tmp_path / "hf"))
    assert largest_difference(ours, theirs) < TOLERANCE
    assert largest_difference(ours, hf_logits(make_model(name))) > 0.01, "the perturbation does not show"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_equals_transformers(name, layout, four_layer_models, tmp_path):
    """Perturbed experts: the step-0 identity would hide a wrong order of experts."""
    paths = four_layer_models(name)
    world, fields = LAYOUTS[layout]
    run("export", "--load", paths["trained"], "--hf", tmp_path / "hf")
    reference = hf_logits(load_hf(tmp_path / "hf"))
    for logits in rank_pool(world).run(megatron_logits, paths["trained"], fields):
        assert largest_difference(logits, reference) < TOLERANCE
