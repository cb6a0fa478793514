"""Attention whose queries, and keys, of all heads are normalised as one vector."""

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron
from megatron_moe_lpr.model.transformer.norm import AllHeadsNorm

KEYS = {
    "self_attention.query_layernorm.": "self_attention.q_layernorm.",
    "self_attention.key_layernorm.": "self_attention.k_layernorm.",
}
"""Keys of the norms in a checkpoint. In the model they have other names than Megatron's norms of each head, whose
gradients it sums over the TP ranks (distributed/finalize_model_grads.py); here each rank has a part of the weight."""


@overrides_megatron
class AllHeadsAttention(SelfAttention):
    """Megatron's attention with `AllHeadsNorm` of queries and keys, as OLMo 2 has it."""

    def __init__(self, config: TransformerConfig, submodules: SelfAttentionSubmodules, **options: Any) -> None:
        super().__init__(config, submodules, **options)
        size, epsilon = self.hidden_size_per_attention_head, config.layernorm_epsilon
        self.query_layernorm = AllHeadsNorm(config, size, epsilon, config.num_attention_heads)
        self.key_layernorm = AllHeadsNorm(config, size, epsilon, config.num_query_groups)

    @override
    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Return queries and keys, normalised, and values, each [sequence, batch, heads / TP, head dimension]."""
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        return self.query_layernorm(query), self.key_layernorm(key), *rest
