"""SwiGLU of GPUs without Transformer Engine and, in chunks, of CPUs against the plain formula in float64."""

import megatron.core.transformer.mlp as megatron_mlp
import megatron.core.transformer.moe.experts as megatron_experts
import pytest
import torch
from megatron.core.fusions import fused_bias_swiglu

from megatron_moe_lpr.platform.torch_only.swiglu import CHUNK_ON_CPUS, SwiGLU, install, swiglu, weighted_swiglu
from tests.platform.test_cpu_kernels import agree, plain_swiglu, random


@pytest.mark.parametrize(("rows", "chunk"), [(0, None), (7, None), (0, 3), (7, 3), (6, 3)])
def test_output_and_gradients(rows, chunk):
    agree(lambda states: swiglu(states, None, chunk=chunk), plain_swiglu, random(rows, 3, 20))
    agree(
        lambda states, weights: weighted_swiglu(states, None, weights, chunk=chunk),
        plain_swiglu,
        random(rows, 20),
        random(rows, 1),
    )
    agree(  # as the original expert has its rows
        lambda states, weights: weighted_swiglu(states, None, weights, chunk=chunk),
        lambda states, weights: plain_swiglu(states, weights.unsqueeze(1)),
        random(rows, 1, 20),
        random(rows, 1),
    )


def test_no_swiglu_that_megatron_would_compile_is_left(monkeypatch):
    """Neither in the experts nor in the original expert, whose MLP takes the router's weight too."""
    places = [
        (megatron_mlp, "bias_swiglu_impl", swiglu),
        (megatron_mlp, "weighted_bias_swiglu_impl", weighted_swiglu),
        (megatron_experts, "weighted_bias_swiglu_impl", weighted_swiglu),
    ]
    for module, name, _ in places:
        monkeypatch.setattr(module, name, getattr(fused_bias_swiglu, name))
    install()
    assert all(getattr(module, name) is ours for module, name, ours in places)
    install(CHUNK_ON_CPUS)
    found = [getattr(module, name) for module, name, _ in places]
    assert [(one.func, one.keywords) for one in found] == [(ours, {"chunk": CHUNK_ON_CPUS}) for *_, ours in places]


@pytest.mark.parametrize("chunk", [None, 3])
def test_dtypes_and_a_frozen_router(chunk):
    states, weights = random(7, 20).bfloat16().requires_grad_(), random(7, 1)
    output = SwiGLU.apply(states, weights, chunk)
    output.sum().backward()
    assert (output.dtype, states.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    weights.requires_grad_()
    SwiGLU.apply(states, weights, chunk).sum().backward()
    assert weights.grad.dtype == torch.float32
