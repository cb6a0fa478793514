"""Rows times the router's weight of each, in one kernel for either pass where torch compiles."""

from typing import Any

import torch
from megatron.core.jit import jit_fuser


class WeightedRows(torch.autograd.Function):
    """Rows times their weights, computed in fp32 and rounded to the rows' dtype."""

    @staticmethod
    def forward(ctx: Any, rows_CD: torch.Tensor, weights_C: torch.Tensor, compiled: bool) -> torch.Tensor:
        """[rows, hidden] and [rows], fp32, to [rows, hidden].

        Args:
            compiled: whether torch compiles, as Megatron's SwiGLU is compiled.
        """
        ctx.save_for_backward(rows_CD, weights_C)
        ctx.compiled = compiled
        return weigh_compiled(rows_CD, weights_C) if compiled else weigh(rows_CD, weights_C)

    @staticmethod
    def backward(ctx: Any, grad_output_CD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Gradients of the rows and of the weights; the latter summed in fp32."""
        function = weigh_backward_compiled if ctx.compiled else weigh_backward
        return *function(grad_output_CD, *ctx.saved_tensors), None


def weigh(rows_CD: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    """Forward pass."""
    return (rows_CD * weights_C[:, None]).to(rows_CD.dtype)


def weigh_backward(
    grad_output_CD: torch.Tensor, rows_CD: torch.Tensor, weights_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward pass."""
    return weigh(grad_output_CD, weights_C), (grad_output_CD.to(weights_C.dtype) * rows_CD).sum(-1)


weigh_compiled = jit_fuser(weigh)
weigh_backward_compiled = jit_fuser(weigh_backward)
