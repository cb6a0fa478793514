"""Batch, precision and what trains: what decides a run's memory beside its model and layout."""

import dataclasses
from typing import Literal

from megatron_moe_lpr.engine.state_options import OptimizerStateOptions
from megatron_moe_lpr.model.configuration.fp8 import FP8Options, FP8Recipe
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.parallel.micro_batches import num_microbatches

FP32 = 4
"""Bytes."""
FP8_BLOCK = 128
"""Values that share an fp32 scale under the recipe blockwise."""


@dataclasses.dataclass(frozen=True)
class RunSizes:
    """Batch, precision and what trains."""

    trains: frozenset[ParameterKind]
    gpus: int
    seq_length: int = 1024
    micro_batch_size: int = 1
    global_batch_size: int = 512
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    """fp8: bf16 with matrix products in FP8."""
    distributed_optimizer: bool = True
    fp8_recipe: FP8Recipe = "delayed"
    fp8_param_gather: bool = False
    """The new experts' weights are in FP8."""
    states: OptimizerStateOptions = dataclasses.field(default_factory=OptimizerStateOptions)
    """Formats of gradients and of the optimizer's state."""
    routing: Literal["balanced", "worst"] = "balanced"
    """balanced: every expert gets as many tokens as every other. worst: all tokens of an EP group choose experts of
    one rank, as many of them as a token may."""
    stored_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dense model's dtype, which frozen weights keep in every checkpoint; None: the dtype of the computation."""

    transformer_engine: bool = True
    """Layers are Transformer Engine's; False: of PyTorch alone (`--transformer-impl local`)."""

    @property
    def fp8(self) -> FP8Options:
        """The flags of a run in this precision."""
        if self.precision != "fp8":
            return FP8Options()
        return FP8Options("hybrid", self.fp8_recipe, fp8_param_gather=self.fp8_param_gather)

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return FP32 if self.precision == "fp32" else 2

    @property
    def frozen_bytes(self) -> int:
        """Bytes of a frozen weight in a checkpoint."""
        if self.stored_dtype is None:
            return self.element_bytes
        return FP32 if self.stored_dtype == "float32" else 2

    @property
    def keeps_frozen(self) -> bool:
        """Frozen weights are kept in host memory as stored, since the model has them in another dtype."""
        computed = "float32" if self.precision == "fp32" else "bfloat16"
        return self.stored_dtype is not None and self.stored_dtype != computed

    def num_microbatches(self, layout: ParallelLayout) -> int:
        """Micro-batches of a rank in one step. Raises UserError where the global batch does not divide."""
        data_parallel_size = layout.data_parallel_size(self.gpus)
        return num_microbatches(self.global_batch_size, self.micro_batch_size, data_parallel_size)
