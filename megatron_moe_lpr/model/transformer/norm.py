"""Norms of Megatron's local layers, and those of all layers that neither Megatron nor Transformer Engine has."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


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


class LayerNorm(RMSNorm):
    """Layer norm (arXiv 1607.06450) with a weight and no bias, as Cohere's models have it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise [..., hidden] to [..., hidden], same dtype."""
        return torch.nn.functional.layer_norm(hidden_states, self.weight.shape, self.weight, None, self.eps)


class AllHeadsNorm(torch.nn.Module):
    """Root mean square norm of the queries, or the keys, of all heads as one vector, as OLMo 2 has it.

    Each TP rank has some of the heads: it sums their squares, the ranks add up the sums, and each multiplies by its
    part of the weight.
    """

    def __init__(self, config: TransformerConfig, head_dim: int, eps: float, num_heads: int) -> None:
        """Build this rank's part; `num_heads` are those of all TP ranks together."""
        super().__init__()
        self.eps, self.width = eps, num_heads * head_dim
        own = self.width // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(own, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Normalise [sequence, batch, heads / TP, head dimension] to the same shape and dtype."""
        wide = heads.float()
        squares = wide.square().sum(dim=(-2, -1), keepdim=True)
        # Every rank's output depends on the sum, and so does the gradient of each rank's part on all ranks' gradients.
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        normalised = wide * torch.rsqrt(squares / self.width + self.eps)
        return (normalised * self.weight.float().view(heads.shape[-2:])).to(heads.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's description of the weight for checkpoints: TP ranks have consecutive parts of it."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)
