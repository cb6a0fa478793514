"""Experts and ranks without a token on the device: forward, backward and reduction go through."""

import dataclasses
import json
import shutil

import pytest
import torch

from megatron_moe_lpr.files.checksum_file import CHECKSUM_FILE
from tests.conversion.helpers import rewrite_checkpoint
from tests.gpu import device
from tests.gpu.compute import Step, compute
from tests.gpu.device import TOLERANCES
from tests.gpu.inputs import gpu_checkpoint, gradient_error, relative_error
from tests.gpu.ranks import run
from tests.gpu.test_layouts import EP2, TP2, limits
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Five experts a layer; expert-parallel rank 0 of two holds the new experts 1 and 2, rank 1 holds 3 and 4."""
    return gpu_checkpoint(tmp_path_factory.mktemp("idle"))


@pytest.fixture(scope="module")
def top_1(checkpoint, tmp_path_factory):
    """The same, with one expert for each token."""
    path = tmp_path_factory.mktemp("top-1") / "checkpoint"
    shutil.copytree(checkpoint, path)
    (card,) = path.rglob("card.json")
    card.write_text(json.dumps(json.loads(card.read_text()) | {"top_k": 1}))
    for checksums in path.rglob(CHECKSUM_FILE.name):
        checksums.unlink()
    return path


def without_a_row(step: Step, path, alone: Step) -> dict:
    """What two EP ranks compute, held against one rank; the second one's experts really get nothing."""
    if device.count() < 2:
        pytest.skip("needs 2 GPUs")
    expected = run(1, compute, "cuda", path, alone)[0]
    found = run(2, compute, "cuda", path, step)
    logits_limit, gradients_limit = limits(step)
    assert relative_error(found[0]["logits"], expected["logits"]) < logits_limit
    assert gradient_error(found[0]["gradients"], expected["gradients"]) < gradients_limit
    assert found[1]["rows"] and not any(found[1]["rows"])
    return found[0]


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("recipe", [None, "tensorwise", "delayed", "blockwise"])
def test_a_rank_without_a_token(recipe, dispatcher, checkpoint):
    precision = (BF16 if recipe else FP32) | {"moe_token_dispatcher_type": dispatcher}
    alone = Step(precision=precision, fp8=RECIPES.get(recipe, {}), experts=(0, 1))
    found = without_a_row(dataclasses.replace(alone, layout=EP2), checkpoint, alone)
    assert any(found["rows"])


@pytest.mark.parametrize("layout", [{}, EP2, TP2, TP2 | EP2], ids=["one rank", "EP2", "TP2", "TP2xEP2"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_every_token_at_the_original_expert_alone(dispatcher, layout, top_1):
    """Top-1: the new experts get no row on any rank. What one process on the CPU computes."""
    precision = FP32 | {"moe_token_dispatcher_type": dispatcher}
    step = Step(stage="full", precision=precision, experts=(0,), layout=layout)
    ranks = 2 if layout else 1
    if device.count() < ranks:
        pytest.skip("needs 2 GPUs")
    exact = run(1, compute, "cpu", top_1, dataclasses.replace(step, layout={}), platform="cpu")[0]
    found = run(ranks, compute, "cuda", top_1, step)
    assert relative_error(found[0]["logits"], exact["logits"]) < TOLERANCES.fp32
    assert gradient_error(found[0]["gradients"], exact["gradients"]) < TOLERANCES.fp32
    assert not any(rows for rank in found for rows in rank["rows"])


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_every_token_at_the_original_expert_alone_in_fp8(recipe, top_1):
    alone = Step(stage="full", precision=BF16 | {"recompute_granularity": "full"}, fp8=RECIPES[recipe], experts=(0,))
    found = without_a_row(dataclasses.replace(alone, layout=EP2), top_1, alone)
    assert not any(found["rows"])
