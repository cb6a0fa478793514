"""A pipeline rank's part of the language model."""

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.config import MoELPRConfig
from megatron_moe_lpr.model.configuration.parameters import NEW_EMBEDDING_KEY, NEW_OUTPUT_KEY
from megatron_moe_lpr.model.extended_vocabulary import (
    ExtendedEmbedding,
    ExtendedOutputLayer,
    ExtensionRows,
    measure_new_token_mass,
)
from megatron_moe_lpr.model.transformer.rope import inverse_frequencies
from megatron_moe_lpr.model.vocabulary import VocabularyLayout


@overrides_megatron
class MoELPRModel(GPTModel):
    """Megatron's GPT with Hugging Face's rotary frequencies, a masked padded vocabulary and tags for every token.

    Token tags ([batch, sequence, 4], `model/moe/token_tags.py`) travel in Megatron's own `padding_mask` argument. As an
    argument they reach each router on every path, activation recompute and pipeline schedules included.
    """

    def __init__(
        self,
        config: MoELPRConfig,
        architecture: Architecture,
        layers: ModuleSpec | TransformerBlockSubmodules,
        vocabulary: VocabularyLayout,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            config,
            layers,
            vocab_size=vocabulary.padded[0],
            max_sequence_length=architecture.max_position_embeddings,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            **kwargs,
        )
        frequencies = inverse_frequencies(architecture.rope, architecture.head_dim)
        self.rotary_pos_emb.inv_freq = frequencies.to(self.rotary_pos_emb.inv_freq.device)
        self._multiply(config)
        if self.pre_process and _needs_gradient_of_embedding(config):
            self.embedding.register_forward_hook(_let_gradients_through)
        self.vocabulary = vocabulary
        self.new_token_mass: torch.Tensor | None = None
        if vocabulary.is_extended:
            self._extend_vocabulary()
        elif self.post_process and vocabulary.padded > vocabulary.rows:
            self._mask_padded_vocabulary(vocabulary.rows[0], vocabulary.padded[0])

    @override
    def _preprocess(self, *, padding_mask: torch.Tensor | None = None, **kwargs: Any) -> tuple:
        """Split the token tags for sequence parallelism on every pipeline rank; GPTModel does so on the first only."""
        prepared = super()._preprocess(padding_mask=None, **kwargs)
        if padding_mask is not None and self.config.sequence_parallel:
            sequence_first = padding_mask.transpose(0, 1).contiguous()
            own = tensor_parallel.scatter_to_sequence_parallel_region(sequence_first, group=self.pg_collection.tp)
            padding_mask = own.transpose(0, 1).contiguous()
        return (*prepared[:5], padding_mask, *prepared[6:])

    @property
    def new_rows(self) -> list[torch.nn.Parameter]:
        """This rank's rows of vocabulary extensions that the first and the last pipeline rank share; empty: none."""
        if not self.vocabulary.is_extended or not self.share_embeddings_and_output_weights:
            return []
        if self.pre_process:
            return self.embedding.new_word_embeddings.weights
        return self.output_layer.new_rows.weights if self.post_process else []

    @override
    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The loss of each token, [batch, sequence]. In an evaluation `new_token_mass` then is the probability that new
        tokens took, of the same shape."""
        if not self.vocabulary.is_extended:
            return super().compute_language_model_loss(labels, logits)
        if not torch.is_grad_enabled():
            # Before the loss, which overwrites fp32 logits.
            mass = measure_new_token_mass(logits, self.vocabulary, self.pg_collection.tp)
            self.new_token_mass = mass.transpose(0, 1).contiguous()
        return super().compute_language_model_loss(self.output_layer.columns[labels], logits)

    @override
    def sharded_state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """The last pipeline rank's copies of tied new rows have the embedding's keys, as its copy of the other rows has
        (language_module.py `tie_embeddings_and_output_weights_state_dict`)."""
        state = super().sharded_state_dict(*arguments, **options)
        if self.pre_process:
            return state
        for number, weight in zip(self.vocabulary.extensions, self.new_rows, strict=False):
            name = NEW_OUTPUT_KEY.format(extension=number)
            state[name] = make_tp_sharded_tensor_for_checkpoint(
                weight,
                NEW_EMBEDDING_KEY.format(extension=number),
                replica_id=(1, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True)),
                allow_shape_mismatch=True,
            )
        return state

    def _multiply(self, config: MoELPRConfig) -> None:
        """Multiply the embedding's output and the logits, by way of the output layer's input, which is smaller."""
        embedding, logits = config.multipliers.embedding, config.multipliers.logits_factor
        if self.pre_process and embedding != 1.0:
            self.embedding.register_forward_hook(lambda module, inputs, output: output * embedding)
        if self.post_process and logits != 1.0:
            self.decoder.register_forward_hook(lambda module, inputs, output: output * logits)

    def _extend_vocabulary(self) -> None:
        """Give the embedding and the output layer the rows of vocabulary extensions."""
        rows = None
        if self.pre_process:
            rows = ExtensionRows(self.config, self.vocabulary, self.pg_collection.tp)
            self.embedding.new_word_embeddings = rows
            self.embedding.word_embeddings = ExtendedEmbedding(self.embedding.word_embeddings, self.vocabulary, rows)
        if self.post_process:
            tied = rows if self.share_embeddings_and_output_weights else None
            base = self.get_submodule("output_layer")
            self.output_layer = ExtendedOutputLayer(base, self.vocabulary, tied, self.config)
        if self.config.pipeline_model_parallel_size > 1:
            for weight in self.new_rows:
                # As language_module.py `setup_embeddings_and_output_layer` marks the two copies of other rows: their
                # optimizer states lie in buckets of their own, and the gradient norm counts only the first copy.
                weight.shared_embedding = True  # type: ignore[attr-defined]
                weight.shared = not self.pre_process  # type: ignore[attr-defined]

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
