"""Linear layers of several experts in plain PyTorch, in place of Transformer Engine's grouped ones.

`grouped_product.py` computes them, on GPUs that have such a kernel by one product for all experts.

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

from megatron_moe_lpr.model.moe.grouped_product import GroupedProduct
from megatron_moe_lpr.platform.devices import parameter_device


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
        self.in_one_launch = config.grouped_products
        for expert, matrix in enumerate(_empty_matrices(num_gemms, shape, config)):
            weight = torch.nn.Parameter(matrix)
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
        return GroupedProduct.apply(tokens, tokens_per_expert, self.in_one_launch, *weights_OI), None

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


def _empty_matrices(count: int, shape: list[int], config: TransformerConfig) -> list[torch.Tensor]:
    """Matrices of this shape; for products in one launch behind each other in memory, as the kernel reads them."""
    device = parameter_device(config.use_cpu_initialization)
    if config.grouped_products:
        return list(torch.empty(count, *shape, dtype=config.params_dtype, device=device))
    return [torch.empty(shape, dtype=config.params_dtype, device=device) for _ in range(count)]


class ColumnParallelGroupedLinear(GroupedLinear):
    """Output rows split over the expert TP ranks."""

    partition_dimension = 0


class RowParallelGroupedLinear(GroupedLinear):
    """Input columns split over the expert TP ranks; the sum over ranks is the token dispatcher's."""

    partition_dimension = 1
