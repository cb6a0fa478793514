"""A pipeline rank's part of the language model."""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.transformer.rope import inverse_frequencies


@overrides_megatron
class MoELPRModel(GPTModel):
    """Megatron's GPT with Hugging Face's rotary frequencies, a masked padded vocabulary and tags for every token.

    Token tags ([batch, sequence, 4], `model/moe/token_tags.py`) travel in Megatron's own `padding_mask` argument. As an
    argument they reach each router on every path, activation recompute and pipeline schedules included.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: Architecture,
        layers: ModuleSpec | TransformerBlockSubmodules,
        padded_vocab_size: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            config,
            layers,
            vocab_size=padded_vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            **kwargs,
        )
        frequencies = inverse_frequencies(architecture.rope, architecture.head_dim)
        self.rotary_pos_emb.inv_freq = frequencies.to(self.rotary_pos_emb.inv_freq.device)
        if self.pre_process and _needs_gradient_of_embedding(config):
            self.embedding.register_forward_hook(_let_gradients_through)
        if self.post_process and padded_vocab_size > architecture.vocab_size:
            self._mask_padded_vocabulary(architecture.vocab_size, padded_vocab_size)

    @override
    def _preprocess(self, *, padding_mask: torch.Tensor | None = None, **kwargs: Any) -> tuple:
        """Split the token tags for sequence parallelism on every pipeline rank; GPTModel does so on the first only."""
        prepared = super()._preprocess(padding_mask=None, **kwargs)
        if padding_mask is not None and self.config.sequence_parallel:
            sequence_first = padding_mask.transpose(0, 1).contiguous()
            own = tensor_parallel.scatter_to_sequence_parallel_region(sequence_first, group=self.pg_collection.tp)
            padding_mask = own.transpose(0, 1).contiguous()
        return (*prepared[:5], padding_mask, *prepared[6:])

    def _mask_padded_vocabulary(self, vocab_size: int, padded_vocab_size: int) -> None:
        """Set the logits of padding rows to the lowest number: they would add to the sum of the softmax."""
        tp = self.pg_collection.tp
        rows = padded_vocab_size // tp.size()
        real = max(0, min(rows, vocab_size - tp.rank() * rows))

        def mask(module: torch.nn.Module, inputs: tuple, output: tuple) -> tuple:
            logits, bias = output
            first = real if logits.shape[-1] == rows else vocab_size
            columns = torch.arange(logits.shape[-1], device=logits.device)
            return logits.masked_fill(columns >= first, torch.finfo(logits.dtype).min), bias

        self.output_layer.register_forward_hook(mask)


def _needs_gradient_of_embedding(config: TransformerConfig) -> bool:
    """Whether a gradient would be lost without one of the embedding's output; see `_let_gradients_through`."""
    return (
        config.transformer_impl == "transformer_engine"
        or bool(config.recompute_granularity)
        or config.pipeline_model_parallel_size > 1
    )


def _let_gradients_through(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """Let the output of a frozen embedding require a gradient, which three mechanisms need.

    Reentrant activation recompute silently skips backward where no input requires a gradient
    (tensor_parallel/random.py `CheckpointFunction`). A pipeline rank sends a gradient to the one before it. Transformer
    Engine's fused permutation gives the routing weights a gradient only where the tokens get one too (permutation.py
    `_moe_permute_mask_map.backward`), and the first router would lose that part. Elsewhere no gradient is needed below
    the first router or trained weight.
    """
    if torch.is_grad_enabled() and not output.requires_grad:
        return output.detach().requires_grad_(True)
    return output
