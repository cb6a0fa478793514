"""SwiGLU that keeps only its input for backward, in place of the functions that Megatron compiles for GPUs.

fusions/fused_bias_swiglu.py compiles its own with torch.compile, which on a CPU needs a C++ compiler. Measured gain
over Megatron's unfused SwiGLU in a step of stage 1 (fp32, hidden size 256, 3 layers, 1,024 tokens): 17% fewer bytes in
tensors at the peak (220 instead of 266 MB); 3% of the CPU time, within the noise.
"""

from typing import Any

import megatron.core.transformer.mlp as megatron_mlp
import megatron.core.transformer.moe.experts as megatron_experts
import torch

from megatron_moe_lpr.megatron.overriding import replace

ROWS = 256
"""Rows of a chunk: the output of one operation is still in the cache when the next one reads it."""


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, times a weight for each row if given. Saves its input only."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """[rows, ..., 2 * FFN] and [rows, ..., 1] to [rows, ..., FFN] in the input's dtype."""
        ctx.save_for_backward(gate_and_up, weights)
        output = gate_and_up.new_empty(*gate_and_up.shape[:-1], gate_and_up.shape[-1] // 2)
        for inputs, result, weight in _chunks(gate_and_up, output, weights):
            gate, up = inputs.chunk(2, dim=-1)
            torch.ops.aten.silu.out(gate, out=result)
            result.mul_(up)
            if weight is not None:
                result.mul_(weight)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of the input and of the weights."""
        gate_and_up, weights = ctx.saved_tensors
        grad_input = torch.empty_like(gate_and_up)
        grad_weights = torch.empty_like(weights) if weights is not None and ctx.needs_input_grad[1] else None
        for chunk in _chunks(gate_and_up, grad_input, grad_output, weights, grad_weights):
            _backward(*chunk)
        return grad_input, grad_weights


def _backward(
    inputs: torch.Tensor,
    grad_input: torch.Tensor,
    grad_output: torch.Tensor,
    weight: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> None:
    """Gradients of some rows, written to `grad_input` and `grad_weight`."""
    (gate, up), (grad_gate, grad_up) = inputs.chunk(2, dim=-1), grad_input.chunk(2, dim=-1)
    # One temporary, first silu(gate) and then the gradient of silu(gate).
    temporary = torch.nn.functional.silu(gate)
    torch.mul(grad_output, temporary, out=grad_up)
    if grad_weight is not None:
        # In fp32, whatever the activations are: the router's gradient comes from here.
        grad_weight.squeeze(-1).copy_(torch.linalg.vecdot(grad_up.to(grad_weight.dtype), up.to(grad_weight.dtype)))
    torch.mul(grad_output, up, out=temporary)
    if weight is not None:
        grad_up.mul_(weight)
        temporary.mul_(weight)
    torch.ops.aten.silu_backward.grad_input(temporary, gate, grad_input=grad_gate)


def _chunks(first: torch.Tensor, *others: torch.Tensor | None) -> zip:
    """The same rows of all tensors, ROWS at a time; None for a tensor that is None."""
    chunks = first.split(ROWS)
    rows = ([None] * len(chunks) if tensor is None else tensor.split(ROWS) for tensor in others)
    return zip(chunks, *rows, strict=True)


def swiglu(
    gate_and_up: torch.Tensor, bias: None, fp8_input_store: bool = False, cpu_offload_input: bool = False
) -> torch.Tensor:
    """`bias_swiglu_impl`, without a bias."""
    return SwiGLU.apply(gate_and_up, None)


def weighted_swiglu(
    gate_and_up: torch.Tensor, bias: None, weights: torch.Tensor, fp8_input_store: bool = False
) -> torch.Tensor:
    """`weighted_bias_swiglu_impl`, without a bias: [rows, ..., 2 * FFN] and [rows, 1]."""
    return SwiGLU.apply(gate_and_up, weights.view(*gate_and_up.shape[:-1], 1))


def install() -> None:
    """Replace SwiGLU in mlp.py `MLP.forward` and moe/experts.py `TEGroupedMLP.forward` (`bias_activation_fusion`)."""
    replace(megatron_mlp, bias_swiglu_impl=swiglu, weighted_bias_swiglu_impl=weighted_swiglu)
    replace(megatron_experts, weighted_bias_swiglu_impl=weighted_swiglu)
