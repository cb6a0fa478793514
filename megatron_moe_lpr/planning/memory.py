"""Memory of one rank, by part.

Weights, gradients and optimizer state follow from the code and are checked against real allocations (tests/planning).
Activations and logits are estimates for Transformer Engine's fused attention.
"""

import dataclasses
from collections.abc import Collection
from typing import Literal

from megatron_moe_lpr.model.config import ModelShape
from megatron_moe_lpr.model.parameter_kinds import ParameterKind
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.activations import Recompute, activation_bytes, logit_bytes
from megatron_moe_lpr.planning.parameters import ParameterCounts, stage_parameters

GIB = 2**30
FP32 = 4
RESERVED_BYTES = 2 * GIB
"""CUDA context, NCCL's buffers and workspaces of the libraries: judgement, not measured."""


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

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return FP32 if self.precision == "fp32" else 2

    def num_microbatches(self, layout: ParallelLayout) -> int:
        """Micro-batches that a rank accumulates in one step."""
        return self.global_batch_size // (self.micro_batch_size * layout.data_parallel_size(self.gpus))


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reserved: float = RESERVED_BYTES

    @property
    def total(self) -> float:
        """All parts; logits are freed before the activations are all there, but the peak comes close to the sum."""
        return sum(dataclasses.astuple(self))


def largest_rank(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, recompute: Recompute) -> RankMemory:
    """Memory of a rank of the pipeline stage that needs most."""
    stages = range(layout.pipeline_model_parallel_size)
    return max((rank_memory(shape, layout, sizes, recompute, stage) for stage in stages), key=lambda rank: rank.total)


def rank_memory(
    shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, recompute: Recompute, stage: int
) -> RankMemory:
    """Memory of a rank of one pipeline stage."""
    counts = stage_parameters(shape, layout, stage)
    return RankMemory(
        weights=weight_bytes(counts, sizes),
        gradients=gradient_bytes(counts, sizes.trains),
        optimizer=optimizer_bytes(counts, layout, sizes),
        activations=activation_bytes(shape, layout, sizes, recompute, stage),
        logits=logit_bytes(shape, layout, sizes, stage),
    )


def weight_bytes(counts: ParameterCounts, sizes: RunSizes) -> int:
    """Routers are fp32 whatever the rest is. FP8 keeps each matrix twice more: its FP8 form and the transposed one."""
    total = sum(count * _weight_size(kind, sizes) for kind, count in counts.items())
    if sizes.precision == "fp8":
        total += 2 * sum(count for kind, count in counts.items() if kind not in ("router", "norm", "embedding"))
    return total


def gradient_bytes(counts: ParameterCounts, trains: Collection[ParameterKind]) -> int:
    """An fp32 buffer for what trains, nothing for the rest."""
    return FP32 * sum(count for kind, count in counts.items() if kind in trains)


def optimizer_bytes(counts: ParameterCounts, layout: ParallelLayout, sizes: RunSizes) -> float:
    """AdamW's two moments and, for weights that are not fp32 themselves, an fp32 copy; split over the ranks that hold
    the same parameters under the distributed optimizer."""
    total = 0.0
    for kind in sizes.trains:
        copies = 2 if _weight_size(kind, sizes) == FP32 else 3
        total += copies * FP32 * counts[kind] / (_holders(kind, layout, sizes) if sizes.distributed_optimizer else 1)
    return total


def _weight_size(kind: ParameterKind, sizes: RunSizes) -> int:
    return FP32 if kind == "router" else sizes.element_bytes


def _holders(kind: ParameterKind, layout: ParallelLayout, sizes: RunSizes) -> int:
    ranks = layout.model_parallel_size
    if kind in ("new experts", "earlier experts"):
        ranks = layout.pipeline_model_parallel_size * layout.expert_model_parallel_size
        ranks *= layout.expert_tensor_parallel_size
    return sizes.gpus // ranks
