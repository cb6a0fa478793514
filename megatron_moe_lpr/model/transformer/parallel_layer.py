"""The parallel block: attention and FFN read one normalised input, and their outputs are added together."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron


@overrides_megatron
class ParallelLayer(TransformerLayer):
    """x + attention(norm(x)) + FFN(norm(x)), as Cohere's models compute it.

    Megatron's own two halves of a layer run on the normalised input, with its recompute of the FFN and of attention;
    their specification has no norms, and `OutputAlone` in the place of the additions.
    """

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *, norm: type, **options: Any
    ) -> None:
        super().__init__(config, submodules, **options)
        self.shared_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)

    @override
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Compute the layer.

        Args:
            hidden_states: [sequence, batch, hidden], with sequence parallelism this rank's part of the sequence.
            args, kwargs: those of Megatron's layer, token tags in `padding_mask` among them.

        Returns:
            The same shape, and Megatron's context, which decoders alone do not have.
        """
        normalised = self.shared_layernorm(hidden_states)
        kwargs.pop("dynamic_inference_decode_only", None)
        attention, context = self._forward_attention(normalised, *args, **kwargs)
        ffn = self._forward_mlp(normalised, padding_mask=kwargs.get("padding_mask"))
        return hidden_states + attention + ffn, context
