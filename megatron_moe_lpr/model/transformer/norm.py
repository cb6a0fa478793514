"""RMSNorm for Megatron's local layers."""

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
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)
