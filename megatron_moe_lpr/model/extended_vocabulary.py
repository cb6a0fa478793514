"""The embedding and the output layer of a model whose vocabulary was extended.

The base model's rows and those of each extension are parameters of their own, so that the former stay frozen to the
bit: a frozen parameter has no gradient buffer, no optimizer state, no weight decay and no weight gradient product.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron
from megatron_moe_lpr.model.vocabulary import VocabularyLayout

Group = torch.distributed.ProcessGroup


@overrides_megatron
class _OneExtensionRows(VocabParallelEmbedding):
    """The rows of one extension on a rank. Whoever computes with them calls the module, which returns its weight."""

    @override
    def forward(self) -> torch.nn.Parameter:
        """The rows, [padded rows / TP, hidden]. DistributedDataParallel's hook before this call waits until updated
        parameters have been gathered (--overlap-param-gather)."""
        return self.weight


@overrides_megatron
class ExtensionRows(MegatronModule):
    """A rank's rows of each vocabulary extension, the oldest one first, split over TP ranks as Megatron's embedding."""

    def __init__(self, config: TransformerConfig, layout: VocabularyLayout, group: Group) -> None:
        super().__init__(config=config)
        for number, rows in zip(layout.extensions, layout.padded[1:], strict=True):
            part = _OneExtensionRows(
                rows, config.hidden_size, init_method=config.init_method, config=config, tp_group=group
            )
            part.weight.is_embedding_or_output_parameter = True  # as Megatron marks the base model's rows
            self.add_module(str(number), part)

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """The rows of each extension as parameters, [padded rows / TP, hidden] each."""
        return [part.get_parameter("weight") for part in self.children()]

    @override
    def forward(self) -> list[torch.nn.Parameter]:
        """The rows of each extension to compute with, see `_OneExtensionRows.forward`."""
        return [part() for part in self.children()]


@overrides_megatron
class ExtendedEmbedding(VocabParallelEmbedding):
    """Megatron's embedding that also finds the rows of vocabulary extensions."""

    def __init__(self, base: VocabParallelEmbedding, layout: VocabularyLayout, extensions: ExtensionRows) -> None:
        """Take the place of `base`, with its weight; `extensions` stays a module of the model, not of this one."""
        torch.nn.Module.__init__(self)
        self.__dict__.update(base.__dict__)
        self.layout = layout
        self.extensions = (extensions,)

    @override
    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """Look up the rows of token ids, [batch, sequence].

        Returns:
            [batch, sequence, hidden], or with sequence parallelism [sequence / TP, batch, hidden].
        """
        weights, rank = (self.weight, *self.extensions[0]()), self.tp_group.rank()
        output = None
        for part, weight in enumerate(weights):
            row = input_ - self.layout.first_ids[part] - rank * self.layout.rank_rows[part]
            is_here = (row >= 0) & (row < self.layout.unpadded(part, rank))
            row = row.masked_fill(~is_here, 0)
            # The backward pass of F.embedding is not deterministic on GPUs.
            found = weight[row] if self.deterministic_mode else torch.nn.functional.embedding(row, weight)
            is_here = is_here.unsqueeze(-1)
            output = found.masked_fill(~is_here, 0.0) if output is None else torch.where(is_here, found, output)
        assert output is not None  # the base model has rows
        if self.reduce_scatter_embeddings:
            sequence_first = output.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(sequence_first, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(output, group=self.tp_group)


@overrides_megatron
class ExtendedOutputLayer(ColumnParallelLinear):
    """Megatron's output layer with further columns for vocabulary extensions, in the order of `VocabularyLayout`."""

    columns: torch.Tensor

    def __init__(
        self,
        base: ColumnParallelLinear,
        layout: VocabularyLayout,
        tied: ExtensionRows | None,
        config: TransformerConfig,
    ) -> None:
        """Take the place of `base`, with its weight.

        Args:
            tied: the embedding's rows where this rank has them and the output layer shares them; None: it has its own.
        """
        torch.nn.Module.__init__(self)
        self.__dict__.update(base.__dict__)
        self.layout = layout
        self.register_buffer("columns", layout.columns(), persistent=False)
        if tied is None:
            self.new_rows = ExtensionRows(config, layout, self.tp_group)
        self.extensions = (tied or self.new_rows,)

    @override
    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        """Compute logits.

        Args:
            input_: [sequence, batch, hidden], with sequence parallelism this rank's part of the sequence.
            weight: the base model's rows, where the embedding has them; None: the layer's own.
            runtime_gather_output: gather the columns of all TP ranks; None: as the model was built.

        Returns:
            This rank's logits [sequence, batch, `VocabularyLayout.width`], the lowest number in columns of no token; or
            gathered ones, [sequence, batch, token ids] in the order of token ids. And no bias.
        """
        weights = (self.weight if weight is None else weight, *self.extensions[0]())
        logits = _LogitsOfParts.apply(input_, self.layout, self.tp_group, self.sequence_parallel, *weights)
        gathers = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if gathers:
            logits = gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
            logits = logits.index_select(-1, self.columns)
        return logits, None

    @override
    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Megatron's would take the extensions' rows for equal ones on all TP ranks."""
        extensions = self._modules.pop("new_rows", None)
        try:
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            if extensions is not None:
                self.new_rows = extensions
        if extensions is not None:
            state |= extensions.sharded_state_dict(f"{prefix}new_rows.", sharded_offsets, metadata)
        return state


class _LogitsOfParts(torch.autograd.Function):
    """Products with several weights side by side in one tensor, and weight gradients of those that train alone.

    Like tensor_parallel/layers.py `LinearWithFrozenWeight` and, for weights that train,
    `LinearWithGradAccumulationAndAsyncCommunication`: the input is gathered again for the weight gradient, so that a
    rank keeps only its part of the sequence.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_: torch.Tensor,
        layout: VocabularyLayout,
        group: Group,
        sequence_parallel: bool,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.layout, ctx.group, ctx.sequence_parallel = layout, group, sequence_parallel
        trains = any(weight.requires_grad for weight in weights)
        ctx.save_for_backward(input_ if trains else None, *weights)
        whole = _gathered(input_, group) if sequence_parallel else input_
        logits = whole.new_empty((*whole.shape[:-1], layout.width))
        rows, columns = whole.flatten(0, -2), logits.flatten(0, -2)
        for part, ((first, end), weight) in enumerate(zip(layout.rank_columns, weights, strict=True)):
            torch.mm(rows, weight.t(), out=columns[:, first:end])
            # Columns of no token would add to the sum of the softmax. At the lowest number they have no gradient.
            columns[:, first + layout.unpadded(part, group.rank()) : end] = torch.finfo(logits.dtype).min
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input_, *weights = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        parts = [gradient[:, first:end] for first, end in ctx.layout.rank_columns]
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = parts[0] @ weights[0]
            for part, weight in zip(parts[1:], weights[1:], strict=True):
                grad_input.addmm_(part, weight)
            grad_input = _reduced(grad_input.view(*gradients[0].shape[:-1], -1), ctx.group, ctx.sequence_parallel)
        trained = ctx.needs_input_grad[4:]
        grad_weights: list[torch.Tensor | None] = [None] * len(weights)
        if any(trained):
            whole = _gathered(input_, ctx.group) if ctx.sequence_parallel else input_
            rows = whole.flatten(0, -2)
            grad_weights = [part.t() @ rows if trains else None for part, trains in zip(parts, trained, strict=True)]
        return grad_input, None, None, None, *grad_weights


def _gathered(input_: torch.Tensor, group: Group) -> torch.Tensor:
    return gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=group)


def _reduced(grad_input: torch.Tensor, group: Group, sequence_parallel: bool) -> torch.Tensor:
    """Sum the input's gradient over the TP ranks, each of which has the columns of some tokens."""
    if sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(grad_input, group=group)
    return reduce_from_tensor_model_parallel_region(grad_input.contiguous(), group=group)


def measure_new_token_mass(logits: torch.Tensor, layout: VocabularyLayout, group: Group) -> torch.Tensor:
    """The probability that all new tokens together take, for each token's prediction.

    Args:
        logits: this TP rank's, [..., `VocabularyLayout.width`].
        group: the TP ranks.

    Returns:
        [...], fp32, the same on every TP rank.
    """
    base, shape = layout.rank_rows[0], logits.shape[:-1]
    # Some tokens at a time: an fp32 copy of all logits would be the largest tensor of an evaluation.
    parts = logits.detach().flatten(0, -2).split(MASS_TOKENS)
    sums = torch.cat([_log_sums(part.float(), base) for part in parts], dim=1)
    largest = sums[0].clone()
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    sums = (sums - largest).exp()
    torch.distributed.all_reduce(sums, group=group)
    return (sums[1] / sums[0]).view(shape)


MASS_TOKENS = 256
"""Tokens whose logits `measure_new_token_mass` copies to fp32 at a time."""


def _log_sums(logits: torch.Tensor, base: int) -> torch.Tensor:
    """Logarithms of the sums of exp over all columns, and over those of new tokens, [2, tokens]."""
    return torch.stack((logits.logsumexp(-1), logits[:, base:].logsumexp(-1)))
