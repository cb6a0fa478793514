"""Linear layers of several experts in plain PyTorch, in place of Transformer Engine's grouped ones.

Megatron's `TEGroupedMLP` uses them unchanged, with the same parameter names and checkpoint keys, so that the new
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
        """Multiply each expert's rows by its matrix.

        Args:
            tokens: [tokens, input], sorted by expert.
            tokens_per_expert: rows of each local expert; zeros are allowed.

        Returns:
            [tokens, output] and no bias.
        """
        weights_OI = [getattr(self, f"weight{expert}") for expert in range(self.num_gemms)]
        return _GroupedProduct.apply(tokens, tokens_per_expert, *weights_OI), None

    def backward_dw(self) -> None:
        """Do nothing: weight gradients are never delayed here."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """One sharded tensor per local expert, under the keys of `TEGroupedLinear`."""
        metadata = metadata or {}
        groups, separate_keys = self.process_groups, metadata.get("singleton_local_shards", False)
        first = get_pg_rank(groups.ep) * self.num_gemms
        sharded: ShardedStateDict = {}
        for expert in range(self.num_gemms):
            # One key for all experts with the expert as a dimension in front, or a key for each expert.
            offsets = sharded_offsets
            if not separate_keys:
                total = get_pg_size(groups.ep) * self.num_gemms
                offsets = (*sharded_offsets, (len(sharded_offsets), first + expert, total))
            # The name's number is only there to be replaced by the prefix of the key.
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
            # Copies of an expert lie on the expert-data-parallel ranks, not on those of the dense weights.
            tensors[name].replica_id = (*tensors[name].replica_id[:2], get_pg_rank(groups.expt_dp))
            sharded[f"{prefix}weight{expert}"] = tensors[name]
        return sharded


class _GroupedProduct(torch.autograd.Function):
    """A product for each expert's rows, written into its slice of the output: no split copies, no concatenation."""

    @staticmethod
    def forward(ctx: Any, rows_RI: torch.Tensor, counts: list[int], *weights_OI: torch.Tensor) -> torch.Tensor:
        """Rows [rows, input], `counts` of each expert, and matrices [output, input] to [rows, output]."""
        ctx.counts = counts
        ctx.save_for_backward(rows_RI, *weights_OI)
        output_RO = rows_RI.new_empty(len(rows_RI), weights_OI[0].shape[0])
        for rows, output, weight in zip(rows_RI.split(counts), output_RO.split(counts), weights_OI, strict=True):
            torch.mm(rows, weight.t(), out=output)
        return output_RO

    @staticmethod
    def backward(ctx: Any, grad_output_RO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the rows and of each matrix that trains; zeros for a matrix without rows."""
        rows_RI, *weights_OI = ctx.saved_tensors
        grad_outputs = grad_output_RO.split(ctx.counts)
        grad_input_RI = None
        if ctx.needs_input_grad[0]:
            grad_input_RI = torch.empty_like(rows_RI)
            for grad_output, grad_input, weight in zip(
                grad_outputs, grad_input_RI.split(ctx.counts), weights_OI, strict=True
            ):
                torch.mm(grad_output, weight, out=grad_input)
        experts = zip(grad_outputs, rows_RI.split(ctx.counts), weights_OI, ctx.needs_input_grad[2:], strict=True)
        return grad_input_RI, None, *(_grad_weight(*expert) if trains else None for *expert, trains in experts)


def _grad_weight(grad_output: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of a matrix. Where the optimizer keeps a gradient buffer it is added there, and the returned tensor
    has no values: what Megatron's layers do under `gradient_accumulation_fusion`, whose mark is set."""
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        return torch.mm(grad_output.t(), rows)
    if buffer.dtype == rows.dtype:
        torch.addmm(buffer, grad_output.t(), rows, out=buffer)
    else:
        buffer.add_(torch.mm(grad_output.t(), rows))
    # An attribute of Megatron's, which torch's class does not have.
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


class ColumnParallelGroupedLinear(GroupedLinear):
    """Output rows split over the expert TP ranks."""

    partition_dimension = 0


class RowParallelGroupedLinear(GroupedLinear):
    """Input columns split over the expert TP ranks; the sum over ranks is the token dispatcher's."""

    partition_dimension = 1
