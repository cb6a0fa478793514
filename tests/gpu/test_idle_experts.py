"""Experts and ranks without a token on the device: forward, backward and reduction go through."""

import pytest
import torch

from tests.conversion.helpers import rewrite_checkpoint
from tests.gpu import device
from tests.gpu.compute import Step, compute
from tests.gpu.device import TOLERANCES
from tests.gpu.inputs import gpu_checkpoint, gradient_error, relative_error
from tests.gpu.ranks import run
from tests.gpu.test_layouts import EP2, limits
from tests.gpu.test_numerics import BF16, RECIPES
from tests.training.test_idle_experts import never_the_original

FP32 = {"fp32": True}


@pytest.fixture(scope="module", params=["two experts", "never the original"])
def routed(request, tmp_path_factory):
    """A checkpoint whose routers leave experts idle."""
    path = gpu_checkpoint(tmp_path_factory.mktemp("idle"))
    change = never_the_original if request.param == "never the original" else torch.zeros_like

    def rewrite(tensors):
        for key in tensors:
            if key.endswith("router.weight"):
                tensors[key] = change(tensors[key])

    rewrite_checkpoint(path, rewrite)
    return path


def test_gradients_equal_the_local_layers(routed):
    exact, found = (run(1, compute, name, routed, Step(precision=FP32), platform=name)[0] for name in ("cpu", "cuda"))
    assert relative_error(found["logits"], exact["logits"]) < TOLERANCES.fp32
    assert gradient_error(found["gradients"], exact["gradients"]) < TOLERANCES.fp32


@pytest.mark.parametrize("recipe", [None, "tensorwise", "delayed", "blockwise"])
def test_a_rank_without_a_token(recipe, routed):
    if device.count() < 2:
        pytest.skip("needs 2 GPUs")
    precision = BF16 if recipe else FP32
    step = Step(precision=precision, fp8=RECIPES.get(recipe, {}), layout=EP2)
    alone = run(1, compute, "cuda", routed, Step(precision=precision, fp8=RECIPES.get(recipe, {})))[0]
    found = run(2, compute, "cuda", routed, step)[0]
    of_logits, of_gradients = limits(step)
    assert relative_error(found["logits"], alone["logits"]) < of_logits
    assert gradient_error(found["gradients"], alone["gradients"]) < of_gradients
