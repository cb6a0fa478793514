"""Linear layers of several experts in plain PyTorch, in the place of Transformer Engine's grouped ones.

Megatron's `TEGroupedMLP` builds on them unchanged, with the same parameter names and checkpoint keys, so that the new
experts are one module on both platforms.
"""

from typing import Any, ClassVar

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide, get_pg_rank, get_pg_size


class GroupedLinear(torch.nn.Module):
    """`num_gemms` matrices, one per local expert; mirrors `TEGroupedLinear` of megatron-core without biases.

    The matrices are left uninitialised: every model of this project is filled from a checkpoint.
    """

    partition_dimension: ClassVar[int]
    """0: output rows are split over the expert TP ranks; 1: input columns."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        bias: bool,
        **unused: Any,
    ) -> None:
        super().__init__()
        if bias:
            raise ValueError("experts with biases are not supported")
        self.num_gemms, self.process_groups = num_gemms, pg_collection
        shape = [output_size, input_size]
        shape[self.partition_dimension] = divide(shape[self.partition_dimension], get_pg_size(pg_collection.expt_tp))
        for expert in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(weight, True, self.partition_dimension, 1)
            self.register_parameter(f"weight{expert}", weight)

    def forward(self, tokens: torch.Tensor, tokens_per_expert: list[int]) -> tuple[torch.Tensor, None]:
        """Multiply each expert's run of rows by its matrix.

        Args:
            tokens: [tokens, input], sorted by expert.
            tokens_per_expert: rows of each local expert; zeros are allowed.

        Returns:
            [tokens, output] and no bias.
        """
        weights = [getattr(self, f"weight{expert}") for expert in range(self.num_gemms)]
        return _GroupedProduct.apply(tokens, tokens_per_expert, *weights), None

    def backward_dw(self) -> None:
        """Nothing: weight gradients are never delayed here."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """One sharded tensor per local expert, under the keys of `TEGroupedLinear`."""
        metadata = metadata or {}
        groups, separate_keys = self.process_groups, metadata.get("singleton_local_shards", False)
        first = get_pg_rank(groups.ep) * self.num_gemms
        sharded: ShardedStateDict = {}
        for expert in range(self.num_gemms):
            offsets = sharded_offsets
            if not separate_keys:
                total = get_pg_size(groups.ep) * self.num_gemms
                offsets = (*sharded_offsets, (len(sharded_offsets), first + expert, total))
            name = f"{expert}.weight"
            tensors = make_sharded_tensors_for_checkpoint(
                {name: getattr(self, f"weight{expert}")},
                "",
                {name: self.partition_dimension},
                offsets,
                tp_group=groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            new_prefix = f"{first + expert}.{prefix}" if separate_keys else prefix
            replace_prefix_for_sharding(tensors, f"{expert}.", new_prefix)
            tensors[name].replica_id = (*tensors[name].replica_id[:2], get_pg_rank(groups.expt_dp))
            sharded[f"{prefix}weight{expert}"] = tensors[name]
        return sharded


class _GroupedProduct(torch.autograd.Function):
    """A product for each run of rows, written where it belongs: nothing is split, and nothing put together again."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, counts: list[int], *weights: torch.Tensor) -> torch.Tensor:
        """[tokens, input] and matrices [output, input] to [tokens, output]."""
        ctx.counts = counts
        ctx.save_for_backward(tokens, *weights)
        output = tokens.new_empty(len(tokens), weights[0].shape[0])
        for rows, result, weight in zip(tokens.split(counts), output.split(counts), weights, strict=True):
            torch.mm(rows, weight.t(), out=result)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of the tokens, and of each matrix that trains; zeros for a matrix without tokens."""
        tokens, *weights = ctx.saved_tensors
        of_tokens = None
        if ctx.needs_input_grad[0]:
            of_tokens = torch.empty_like(tokens)
            for rows, result, weight in zip(
                gradient.split(ctx.counts), of_tokens.split(ctx.counts), weights, strict=True
            ):
                torch.mm(rows, weight, out=result)
        runs = zip(gradient.split(ctx.counts), tokens.split(ctx.counts), weights, ctx.needs_input_grad[2:], strict=True)
        return of_tokens, None, *(_of_weight(*run) if trains else None for *run, trains in runs)


def _of_weight(gradient: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of a matrix; where the optimizer keeps a buffer it is added to that, and what is returned has no
    values. Megatron's marks for this are those of its `gradient_accumulation_fusion`."""
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        return torch.mm(gradient.t(), tokens)
    if buffer.dtype == tokens.dtype:
        torch.addmm(buffer, gradient.t(), tokens, out=buffer)
    else:
        buffer.add_(torch.mm(gradient.t(), tokens))
    # An attribute of Megatron's, which torch's class does not have.
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


class ColumnParallelGroupedLinear(GroupedLinear):
    """Output rows split over the expert TP ranks."""

    partition_dimension = 0


class RowParallelGroupedLinear(GroupedLinear):
    """Input columns split over the expert TP ranks; the sum over ranks is the token dispatcher's."""

    partition_dimension = 1
