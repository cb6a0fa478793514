"""How the output of attention or FFN joins the residual stream, in families that do more than add it."""

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

Addition = Callable[[tuple[torch.Tensor, None], torch.Tensor, float], torch.Tensor]


class ResidualBranch(torch.nn.Module):
    """residual + multiplier * norm(output), in the place of fusions/fused_bias_dropout.py `get_bias_dropout_add`.

    For Granite's `residual_multiplier` and for OLMo 2, which normalises what attention and FFN put out. No biases and
    no dropout: no family here has them.
    """

    def __init__(self, config: TransformerConfig, norm: type | None, multiplier: float) -> None:
        """`norm` is the class of the norm of the output; None: it is added as it is."""
        super().__init__()
        self.multiplier = multiplier
        self.layernorm = norm(config, config.hidden_size, config.layernorm_epsilon) if norm else None

    def forward(self, training: bool, fused: bool) -> Addition:
        """Return the function that Megatron's layer calls: (output, bias), residual and dropout to the sum."""
        return self._add

    def _add(self, output_with_bias: tuple[torch.Tensor, None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
        output, _ = output_with_bias
        if self.layernorm is not None:
            output = self.layernorm(output)
        return residual + (output if self.multiplier == 1.0 else output * self.multiplier)


class OutputAlone(torch.nn.Module):
    """The output without the residual, which `ParallelLayer` adds once for attention and FFN together."""

    def forward(self, training: bool, fused: bool) -> Addition:
        """Return the function that Megatron's layer calls: (output, bias), residual and dropout to the output."""
        return lambda output_with_bias, residual, dropout: output_with_bias[0]
