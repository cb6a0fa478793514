"""Forward passes that continue a text: keys and values of earlier tokens are kept, not computed again."""

from collections.abc import Sequence

import torch
from megatron.core.inference.contexts import StaticInferenceContext

from megatron_moe_lpr.model.configuration.config import MoELPRConfig
from megatron_moe_lpr.model.forward import compute_logits


class CachedForward:
    """A model with the keys and values of the tokens that it has read, in Megatron's `StaticInferenceContext`.

    The cache of a layer is [positions, batch, query groups / TP, head dimension] twice, in the model's dtype. The
    model must be built without sequence parallelism, since one token cannot be split over the TP ranks.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], config: MoELPRConfig, vocab_size: int, batch: int, length: int
    ) -> None:
        """Begin `batch` texts of at most `length` tokens each.

        Args:
            chunks: this rank's part of the model.
            vocab_size: number of token ids.
        """
        if config.sequence_parallel:
            raise ValueError("a cache needs a model without sequence parallelism")
        self.chunks, self.config, self.vocab_size = chunks, config, vocab_size
        self.cache = StaticInferenceContext(batch, length)

    @torch.no_grad()
    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read the next tokens of every text. Every rank must call it, with the same tokens on all of them.

        Args:
            tokens: int64 [batch, tokens], on the platform's device.

        Returns:
            Logits of the token after the last one, fp32 [batch, vocab_size], the same on every rank.
        """
        logits = compute_logits(self.chunks, self.config, tokens, self.vocab_size, cache=self.cache)
        self.cache.sequence_len_offset += tokens.shape[1]
        return logits[:, -1]
