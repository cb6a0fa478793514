"""What layers of PyTorch alone compute by one kernel on a GPU and by several operations on a CPU: the norm."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch

AsOne = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes of a function one that a log takes for one kernel."""


@contextlib.contextmanager
def norm_as_one_kernel(as_one: AsOne) -> Iterator[None]:
    """Inside, `torch.nn.functional.rms_norm` keeps what CUDA's `_fused_rms_norm` keeps: its input and, in fp32, a
    number for each row (aten/native/cuda/layer_norm_kernel.cu, derivatives.yaml). On a CPU it keeps copies in fp32."""
    forward, backward = as_one(rms_norm_forward), as_one(rms_norm_backward)

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            output, scale = forward(inputs, weight, eps)
            ctx.save_for_backward(inputs, weight, scale)
            return output

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
            return *backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:2]), None

    def rms_norm(inputs: torch.Tensor, shape: Sequence[int], weight: torch.Tensor, eps: float) -> torch.Tensor:
        return Norm.apply(inputs, weight, eps)

    with patch.object(torch.nn.functional, "rms_norm", rms_norm):
        yield


def rms_norm_forward(inputs: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised rows, and what each was multiplied by, in fp32."""
    wide = inputs.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(inputs.dtype), scale


def rms_norm_backward(
    grad: torch.Tensor,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    for_inputs: bool,
    for_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the inputs and of the weight, None where none is needed."""
    normalised, wide = inputs.float() * scale, grad.float()
    weighted = wide * weight.float()
    shared = (weighted * normalised).mean(-1, keepdim=True)
    grad_inputs = (scale * (weighted - normalised * shared)).to(inputs.dtype) if for_inputs else None
    grad_weight = (wide * normalised).flatten(0, -2).sum(0).to(weight.dtype) if for_weight else None
    return grad_inputs, grad_weight
