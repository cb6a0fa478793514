"""RMSNorm for Megatron's local layers."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    Megatron's own wrapper of torch's norms refuses sequence parallelism because its weight lacks the mark that
    makes Megatron add up the weight's gradient over the TP ranks; here the weight carries it.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # The mark is an attribute of Megatron's, which torch's class does not have.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise [..., hidden] to [..., hidden], same dtype."""
        return _RootMeanSquareNorm.apply(hidden_states, self.weight, self.eps)


class _RootMeanSquareNorm(torch.autograd.Function):
    """torch's own is made of single operations, each with a pass over memory in either direction."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, in fp32, rounded once to the dtype of x."""
        size = hidden_states.shape[-1]
        norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square().div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden_states, weight, scale)
        return (hidden_states * scale).mul_(weight).to(hidden_states.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Of x: scale * (g w - x * scale^2 * mean(g w x)); of the weight: the sum over rows of g x scale."""
        hidden_states, weight, scale = ctx.saved_tensors
        of_input = of_weight = None
        if ctx.needs_input_grad[1]:
            rows = (hidden_states * scale).mul_(gradient)
            of_weight = rows.flatten(0, -2).sum(dim=0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            weighted = gradient.float() * weight
            mean = torch.linalg.vecdot(weighted, hidden_states.float()).unsqueeze(-1) / hidden_states.shape[-1]
            of_input = weighted.addcmul_(hidden_states, mean * scale.square(), value=-1).mul_(scale)
            of_input = of_input.to(hidden_states.dtype)
        return of_input, of_weight, None
