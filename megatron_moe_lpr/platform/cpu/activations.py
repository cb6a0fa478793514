"""SwiGLU in few passes over memory, in the place of the functions that Megatron compiles for GPUs.

fusions/fused_bias_swiglu.py compiles its own with torch.compile, which on a CPU needs a C++ compiler.
"""

from typing import Any

import megatron.core.transformer.mlp as megatron_mlp
import megatron.core.transformer.moe.experts as megatron_experts
import torch

from megatron_moe_lpr.megatron.overriding import replace

ROWS = 256
"""Rows of a turn: what one pass has written is still in the cache when the next one reads it."""


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, times a weight for each row where there is one. Keeps its input only."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """[rows, ..., 2 * FFN] and [rows, ..., 1] to [rows, ..., FFN] in the input's dtype."""
        ctx.save_for_backward(gate_and_up, weights)
        output = gate_and_up.new_empty(*gate_and_up.shape[:-1], gate_and_up.shape[-1] // 2)
        for inputs, result, weight in _turns(gate_and_up, output, weights):
            gate, up = inputs.chunk(2, dim=-1)
            torch.ops.aten.silu.out(gate, out=result)
            result.mul_(up)
            if weight is not None:
                result.mul_(weight)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of the input and of the weights."""
        gate_and_up, weights = ctx.saved_tensors
        of_input = torch.empty_like(gate_and_up)
        of_weights = torch.empty_like(weights) if weights is not None and ctx.needs_input_grad[1] else None
        turns = _turns(gate_and_up, of_input, gradient, weights, of_weights)
        for inputs, result, of_output, weight, of_weight in turns:
            _backward(inputs, result, of_output, weight, of_weight)
        return of_input, of_weights


def _backward(
    inputs: torch.Tensor,
    result: torch.Tensor,
    of_output: torch.Tensor,
    weight: torch.Tensor | None,
    of_weight: torch.Tensor | None,
) -> None:
    """Gradients of some rows, written to `result` and `of_weight`."""
    (gate, up), (of_gate, of_up) = inputs.chunk(2, dim=-1), result.chunk(2, dim=-1)
    kept = torch.nn.functional.silu(gate)
    torch.mul(of_output, kept, out=of_up)
    if of_weight is not None:
        # In fp32, whatever the activations are: the router's gradient comes from here.
        of_weight.squeeze(-1).copy_(torch.linalg.vecdot(of_up.to(of_weight.dtype), up.to(of_weight.dtype)))
    torch.mul(of_output, up, out=kept)
    if weight is not None:
        of_up.mul_(weight)
        kept.mul_(weight)
    torch.ops.aten.silu_backward.grad_input(kept, gate, grad_input=of_gate)


def _turns(first: torch.Tensor, *others: torch.Tensor | None) -> zip:
    """The same rows of all of them."""
    turns = first.split(ROWS)
    rows = ([None] * len(turns) if tensor is None else tensor.split(ROWS) for tensor in others)
    return zip(turns, *rows, strict=True)


def swiglu(
    gate_and_up: torch.Tensor, bias: None, fp8_input_store: bool = False, cpu_offload_input: bool = False
) -> torch.Tensor:
    """`bias_swiglu_impl`, without a bias."""
    return SwiGLU.apply(gate_and_up, None)


def weighted_swiglu(
    gate_and_up: torch.Tensor, bias: None, weights: torch.Tensor, fp8_input_store: bool = False
) -> torch.Tensor:
    """`weighted_bias_swiglu_impl`, without a bias."""
    return SwiGLU.apply(gate_and_up, weights)


def install() -> None:
    """mlp.py `MLP.forward`, moe/experts.py `TEGroupedMLP.forward` with `bias_activation_fusion`."""
    replace(megatron_mlp, bias_swiglu_impl=swiglu)
    replace(megatron_experts, weighted_bias_swiglu_impl=weighted_swiglu)
