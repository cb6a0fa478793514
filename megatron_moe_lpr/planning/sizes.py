"""What of a run decides its memory, beside model and layout."""

import dataclasses
from typing import Literal

from megatron_moe_lpr.model.configuration.fp8 import FP8Recipe
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.parallel.layout import ParallelLayout

FP32 = 4


@dataclasses.dataclass(frozen=True)
class RunSizes:
    """What of a run decides its memory, beside model and layout."""

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
    routing: Literal["balanced", "worst"] = "balanced"
    """balanced: every expert gets as many tokens as every other. worst: all tokens of an EP group choose experts of
    one rank, as many of them as a token may."""

    stored_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the dense model, which frozen weights keep in every checkpoint; None: what is computed in."""

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

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return FP32 if self.precision == "fp32" else 2

    def num_microbatches(self, layout: ParallelLayout) -> int:
        """Micro-batches that a rank accumulates in one step."""
        return self.global_batch_size // (self.micro_batch_size * layout.data_parallel_size(self.gpus))
