"""The fused kernels that are on by default on GPUs are the ones that compute, emulated or not."""

import dataclasses
import functools
import importlib
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.gpu import device
from tests.gpu.compute import Step, compute
from tests.gpu.device import TOLERANCES
from tests.gpu.inputs import gradient_error, relative_error
from tests.gpu.ranks import run
from tests.gpu.test_layouts import EP2
from tests.gpu.test_numerics import BF16, RECIPES

# Where Megatron-Core and Transformer Engine enter a fused kernel, in Python.
ENTRANCES = {
    "RoPE": "transformer_engine.pytorch.attention.rope:FusedRoPEFunc.apply",
    "SwiGLU": "megatron.core.fusions.fused_bias_swiglu:WeightedSwiGLUFunction.apply",
    "permutation": "megatron.core.transformer.moe.moe_utils:fused_permute_with_probs",
    "permutation back": "megatron.core.transformer.moe.moe_utils:fused_unpermute",
    "router": "transformer_engine.pytorch.router:FusedTopkScoreFunction.apply",
    "cross entropy": "megatron.core.fusions.fused_cross_entropy:_VocabParallelCrossEntropy.apply",
    "grouped product": "transformer_engine.pytorch.module.grouped_linear:_GroupedLinear.apply",
}
LAYERS, BATCHES, FORWARD = 4, 4, 1  # of four micro-batches the step, of all samples at once the logits
PASSES = LAYERS * (BATCHES + FORWARD)
EXPECTED = {
    "RoPE": 2 * PASSES,  # queries and keys
    "SwiGLU": 2 * PASSES,  # with the router's weight: the original expert and the new ones
    "permutation": PASSES,
    "permutation back": PASSES,
    "router": PASSES,
    "cross entropy": BATCHES,
    "grouped product": 2 * LAYERS * BATCHES,  # fc1 and fc2; without gradients no autograd function is entered
}
# The emulated kernels behind them, forward and backward.
EMULATED = [
    "fused_rope_forward",
    "fused_rope_backward",
    "fused_topk_with_score_function_fwd",
    "fused_topk_with_score_function_bwd",
    "make_row_id_map",
    "permute_with_mask_map",
    "unpermute_with_mask_map",
    "te_general_grouped_gemm",
    "generic_gemm",
    "fused_attn_fwd",
    "fused_attn_bwd",
    "rmsnorm_fwd",
    "rmsnorm_bwd",
]


def count_calls(checkpoint: Path, step: Step) -> tuple[Counter, Counter, dict[str, Any]]:
    """On every rank: how often a step enters each fused kernel, and calls each emulated one; what it computes."""
    entered: Counter = Counter()
    kernels = importlib.import_module("tests.emulation.kernels")
    kernels.CALLS.clear()
    with ExitStack() as stack:
        for name, place in ENTRANCES.items():
            stack.enter_context(_counting(name, place, entered))
        computed = compute("cuda", checkpoint, step)
    return entered, Counter(kernels.CALLS), computed


def _counting(name: str, place: str, counts: Counter):
    module, path = place.split(":")
    *owners, attribute = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, attribute)

    def counted(*arguments, **options):
        counts[name] += 1
        return original(*arguments, **options)

    return patch.object(owner, attribute, counted)


@pytest.mark.parametrize("recipe", [None, "tensorwise"])
def test_they_compute_every_layer_of_every_pass(recipe, inputs):
    step = Step(precision=BF16, fp8=RECIPES.get(recipe, {}))
    entered, emulated, _ = run(1, count_calls, inputs[0], step)[0]
    assert entered == EXPECTED
    if device.EMULATED:
        assert [name for name in EMULATED if not emulated[name]] == []
        quantised = {name: emulated[name] > 0 for name in ("quantize", "split_quantize", "fused_multi_row_padding")}
        assert quantised == dict.fromkeys(quantised, recipe is not None)


def count_router_calls(checkpoint: Path, step: Step) -> tuple[int, dict]:
    """On every rank: how often a step enters the router's fused kernel, and what it computes."""
    entered: Counter = Counter()
    with _counting("router", ENTRANCES["router"], entered):
        found = compute("cuda", checkpoint, step)
    return entered["router"], found


def test_the_router_without_its_kernel_computes_the_same(inputs):
    (fused, expected), (unfused, found) = (
        run(1, count_router_calls, inputs[0], Step(precision={"fp32": True, "moe_router_fusion": on}))[0]
        for on in (True, False)
    )
    assert (fused > 0, unfused) == (True, 0)
    assert relative_error(found["logits"], expected["logits"]) < TOLERANCES.fp32
    assert gradient_error(found["gradients"], expected["gradients"]) < TOLERANCES.fp32


def test_ranks_that_exchange_tokens_sort_them_with_a_kernel_too(inputs):
    if device.count() < 2:
        pytest.skip("needs 2 GPUs")
    for entered, emulated, _ in run(2, count_calls, inputs[0], Step(precision=BF16, layout=EP2)):
        assert entered["permutation"] == LAYERS * (BATCHES // 2 + FORWARD)
        assert not device.EMULATED or emulated["sort_chunks_by_map"] > 0


PLAIN = {"moe_permute_fusion": False, "moe_router_fusion": False}


@pytest.mark.parametrize(("recipe", "layout"), [(None, {}), ("tensorwise", EP2)])
def test_switched_off_they_are_not_entered_and_nothing_else_changes(recipe, layout, inputs):
    """--no-moe-permute-fusion and --no-moe-router-fusion: gathers and torch's softmax in their place."""
    world = 2 if layout else 1
    if device.count() < world:
        pytest.skip(f"needs {world} GPUs")
    precision = BF16 if recipe else {"fp32": True}
    fused = Step(precision=precision, fp8=RECIPES.get(recipe, {}), layout=layout, fixed_routing=True)
    plain = dataclasses.replace(fused, precision=precision | PLAIN)
    expected = run(world, compute, "cuda", inputs[0], fused)[0]
    entered, _, found = run(world, count_calls, inputs[0], plain)[0]
    # Weights of the router are rounded to bf16 at another place.
    limit = TOLERANCES.bf16_layout if recipe else TOLERANCES.fp32
    assert relative_error(found["logits"], expected["logits"]) < limit
    assert gradient_error(found["gradients"], expected["gradients"]) < (TOLERANCES.fp8 if recipe else limit)
    assert not entered["permutation"] + entered["permutation back"] + entered["router"]
