"""SwiGLU of GPUs without Transformer Engine: PyTorch's own kernels, where Megatron compiles its functions.

fusions/fused_bias_swiglu.py calls torch.compile, which needs Triton and a C compiler at run time.
"""

from typing import Any

import megatron.core.transformer.mlp as megatron_mlp
import megatron.core.transformer.moe.experts as megatron_experts
import torch

from megatron_moe_lpr.megatron.overriding import replace


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, times a weight for each row if given. Saves its input only."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """[rows, ..., 2 * FFN] and [rows, ..., 1] to [rows, ..., FFN] in the input's dtype."""
        ctx.save_for_backward(gate_and_up, weights)
        gate, up = gate_and_up.chunk(2, dim=-1)
        output = torch.nn.functional.silu(gate).mul_(up)
        return output if weights is None else output.mul_(weights)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of the input and of the weights; the latter summed in fp32."""
        gate_and_up, weights = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        grad_input, grad_weights = torch.empty_like(gate_and_up), None
        grad_gate, grad_up = grad_input.chunk(2, dim=-1)
        torch.mul(grad_output, torch.nn.functional.silu(gate), out=grad_up)
        if weights is not None and ctx.needs_input_grad[1]:
            # The router's gradient comes from here.
            grad_weights = (grad_up.to(weights.dtype) * up).sum(-1, keepdim=True)
        grad_activation = grad_output * up
        if weights is not None:
            grad_up.mul_(weights)
            grad_activation.mul_(weights)
        torch.ops.aten.silu_backward.grad_input(grad_activation, gate, grad_input=grad_gate)
        return grad_input, grad_weights


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
