"""SwiGLU in few passes over memory, in the place of the functions that Megatron compiles for GPUs.

fusions/fused_bias_swiglu.py compiles its own with torch.compile, which on a CPU needs a C++ compiler.
"""

from typing import Any

import megatron.core.transformer.mlp as megatron_mlp
import megatron.core.transformer.moe.experts as megatron_experts
import torch


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, times a weight for each row where there is one. Keeps its input only."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """[rows, 2 * FFN] and [rows, 1] to [rows, FFN] in the input's dtype."""
        ctx.save_for_backward(gate_and_up, weights)
        gate, up = gate_and_up.chunk(2, dim=-1)
        output = torch.nn.functional.silu(gate).mul_(up)
        return output if weights is None else output.mul_(weights)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of the input and of the weights."""
        gate_and_up, weights = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        of_input = torch.empty_like(gate_and_up)
        of_gate, of_up = of_input.chunk(2, dim=-1)
        activated, of_weights = torch.nn.functional.silu(gate), None
        if weights is not None:
            if ctx.needs_input_grad[1]:
                of_weights = torch.linalg.vecdot((activated * up).to(weights.dtype), gradient.to(weights.dtype))
                of_weights = of_weights.unsqueeze(-1)
            gradient = (gradient * weights).to(gradient.dtype)
        torch.mul(gradient, activated, out=of_up)
        of_gate.copy_(torch.ops.aten.silu_backward(gradient * up, gate))
        return of_input, of_weights


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
    megatron_mlp.bias_swiglu_impl = swiglu
    megatron_experts.weighted_bias_swiglu_impl = weighted_swiglu
