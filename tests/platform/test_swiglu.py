"""SwiGLU of GPUs without Transformer Engine against the plain formula in float64."""

import pytest
import torch

from megatron_moe_lpr.platform.torch_only.swiglu import SwiGLU, swiglu, weighted_swiglu
from tests.platform.test_cpu_kernels import agree, plain_swiglu, random


@pytest.mark.parametrize("rows", [0, 7])
def test_output_and_gradients(rows):
    agree(lambda states: swiglu(states, None), plain_swiglu, random(rows, 3, 20))
    agree(
        lambda states, weights: weighted_swiglu(states, None, weights), plain_swiglu, random(rows, 20), random(rows, 1)
    )


def test_dtypes_and_a_frozen_router():
    states, weights = random(7, 20).bfloat16().requires_grad_(), random(7, 1)
    output = SwiGLU.apply(states, weights)
    output.sum().backward()
    assert (output.dtype, states.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    weights.requires_grad_()
    SwiGLU.apply(states, weights).sum().backward()
    assert weights.grad.dtype == torch.float32
