"""Attention of the local layers by PyTorch's own kernel, in place of Megatron's products and softmax."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.functional import scaled_dot_product_attention

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron


@overrides_megatron
class LocalAttention(DotProductAttention):
    """Causal attention, with a sliding window where the model has one; no dropout.

    Mirrors `DotProductAttention` of megatron-core, which keeps scores [batch x heads, sequence, sequence] for the
    backward pass; here none are kept. Measured gain in a step of full training with sequences of 1,024 (fp32, hidden
    size 256, 2 layers, 8 heads): 38% fewer bytes in tensors at the peak (196 instead of 315 MB); with sequences of 256
    2% fewer, and 3% of the CPU time, within the noise.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, attention_type, pg_collection=pg_collection, **kwargs)
        if attn_mask_type is not AttnMaskType.causal or config.attention_dropout:
            raise ValueError("local attention is causal and without dropout")
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size if has_window else None

    @override
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, **kwargs: object
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [sequence, batch, heads / TP, head dimension].
            key, value: [sequence, batch, query groups / TP, head dimension].
            attention_mask: None; every position sees itself and those before it.

        Returns:
            [sequence, batch, heads / TP x head dimension].
        """
        repeats = query.shape[2] // key.shape[2]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
        mask = self._window_mask(query.shape[0], query.device)
        context = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _window_mask(self, length: int, device: torch.device) -> torch.Tensor | None:
        """Boolean mask [query, key]: true for the position itself and the `window[0]` before it; None: all fit."""
        if self.window is None or length <= self.window[0] + 1:
            return None
        positions = torch.arange(length, device=device)
        distance = positions[:, None] - positions
        return (distance >= 0) & (distance <= self.window[0])
