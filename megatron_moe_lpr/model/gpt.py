"""A pipeline rank's part of the language model."""

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron, replace
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.config import MoELPRConfig
from megatron_moe_lpr.model.configuration.parameters import NEW_EMBEDDING_KEY, NEW_OUTPUT_KEY
from megatron_moe_lpr.model.extended_vocabulary import (
    ExtendedEmbedding,
    ExtendedOutputLayer,
    ExtensionRows,
    measure_new_token_mass,
)
from megatron_moe_lpr.model.moe.token_tags import PRIOR
from megatron_moe_lpr.model.new_token_loss import CrossEntropyWithNewTokenLoss
from megatron_moe_lpr.model.transformer.packed_documents import DocumentLengths, packed_documents
from megatron_moe_lpr.model.transformer.rope import inverse_frequencies
from megatron_moe_lpr.model.vocabulary import VocabularyLayout
from megatron_moe_lpr.parallel.context import own_tokens


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
        # The angles of all CP ranks: `_preprocess` takes this rank's. Megatron's way to them needs pinned memory.
        replace(self.rotary_pos_emb, cp_group=None)
        self._multiply(config)
        if self.pre_process and _needs_gradient_of_embedding(config):
            self.embedding.register_forward_hook(_let_gradients_through)
        self.vocabulary = vocabulary
        self.new_token_mass: torch.Tensor | None = None
        self._prior: torch.Tensor | None = None
        if vocabulary.is_extended:
            self._extend_vocabulary()
        elif self.post_process and vocabulary.padded > vocabulary.rows:
            self._mask_padded_vocabulary(vocabulary.rows[0], vocabulary.padded[0])

    @override
    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: None,
        *,
        labels: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute this pipeline rank's part.

        Args:
            input_ids, position_ids, labels: [batch, sequence]; under context parallelism this rank's tokens of each
                sequence (`parallel/context.py`), here and below.
            padding_mask: token tags, [batch, sequence, 4].
            cu_seqlens: documents that do not see each other, int32 [documents + 1]: where each begins in
                `input_ids.flatten()` of all CP ranks, then the number of tokens. None: all tokens of a sample see those
                before them.
            kwargs: further arguments of GPTModel.

        Returns:
            On the last pipeline rank the loss of each token, [batch, sequence], or without labels the logits, [batch,
            sequence, vocabulary]. On the others hidden states, [sequence / TP, batch, hidden], with `cu_seqlens`
            [batch x sequence / TP, 1, hidden].
        """
        if cu_seqlens is None:
            given = {"labels": labels, "padding_mask": padding_mask}
            return super().forward(input_ids, position_ids, attention_mask, **given, **kwargs)
        length = input_ids.shape[1] * self.config.context_parallel_size
        packed = packed_documents(cu_seqlens, length, self.config.transformer_impl == "transformer_engine")
        tensors = (input_ids, position_ids, labels, padding_mask)
        flat = [None if tensor is None else tensor.flatten(0, 1)[None] for tensor in tensors]
        given = {"labels": flat[2], "padding_mask": flat[3], "packed_seq_params": packed}
        output = super().forward(flat[0], flat[1], attention_mask, **given, **kwargs)
        if not self.post_process:
            return output
        if self.new_token_mass is not None:
            self.new_token_mass = self.new_token_mass.view(input_ids.shape)
        return output.view(*input_ids.shape, *output.shape[2:])

    @override
    def _preprocess(
        self,
        *,
        position_ids: torch.Tensor,
        packed_seq_params: Any = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple:
        """Split the token tags for sequence parallelism on every pipeline rank; GPTModel does so on the first only.

        Where local attention keeps documents apart, take each token's rotary angles by its position; GPTModel counts.
        Under context parallelism take those of this rank's tokens.
        """
        kwargs |= {"position_ids": position_ids, "packed_seq_params": packed_seq_params}
        prepared = super()._preprocess(padding_mask=None, **kwargs)
        if isinstance(packed_seq_params, DocumentLengths):
            prepared = (prepared[0], prepared[1][position_ids.flatten()], *prepared[2:])
        elif self.config.context_parallel_size > 1:
            prepared = (prepared[0], own_tokens(prepared[1], 0, self.pg_collection.cp), *prepared[2:])
        self._prior = None if padding_mask is None else padding_mask[..., PRIOR]
        if self.config.num_moe_experts is None:
            padding_mask = None  # The loss reads the tags; a dense layer has no router that would.
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
        columns = self.output_layer.columns[labels]
        if torch.is_grad_enabled() and self.config.new_token_loss_coeff and self._prior is not None:
            return self._loss_with_new_token_loss(labels, columns, logits, self._prior)
        if not torch.is_grad_enabled():
            # Before the loss, which overwrites fp32 logits.
            mass = measure_new_token_mass(logits, self.vocabulary, self.pg_collection.tp)
            self.new_token_mass = mass.transpose(0, 1).contiguous()
        return super().compute_language_model_loss(columns, logits)

    def _loss_with_new_token_loss(
        self, labels: torch.Tensor, columns: torch.Tensor, logits: torch.Tensor, prior: torch.Tensor
    ) -> torch.Tensor:
        """The loss of each token, [batch, sequence]. Its gradient has that of the new-token loss of languages with a
        prior too, where the next token is none of the latest extension.

        Args:
            labels: token ids, [batch, sequence].
            columns: the same as columns of the logits.
            logits: this TP rank's, [sequence, batch, `VocabularyLayout.width`].
            prior: tag `PRIOR` of each token, [batch, sequence].
        """
        is_known = labels < self.vocabulary.first_ids[-1]
        weights = (prior * is_known * self.config.new_token_loss_coeff).transpose(0, 1).contiguous()
        first_new, _ = self.vocabulary.rank_columns[-1]
        columns = columns.transpose(0, 1).contiguous()
        loss = CrossEntropyWithNewTokenLoss.apply(logits, columns, weights, first_new, self.pg_collection.tp)
        return loss.transpose(0, 1).contiguous()

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
