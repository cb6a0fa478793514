"""Memory of one rank, by part.

Weights, gradients and optimizer state follow from the code and are checked against real allocations (tests/planning).
Weights in FP8, activations and logits are checked on Transformer Engine's emulation (tests/gpu/test_memory.py).
"""

import dataclasses
from collections.abc import Collection

from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.activations import Recompute, activation_bytes, logit_bytes
from megatron_moe_lpr.planning.parameters import ParameterCounts, stage_parameters
from megatron_moe_lpr.planning.sizes import FP32, RunSizes

GIB = 2**30
RESERVED_BYTES = 2 * GIB
"""CUDA context, NCCL's buffers and workspaces of the libraries: judgement, not measured."""


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """What is kept, and what a layer's backward pass needs beyond the logits' memory."""
    logits: float
    reserved: float = RESERVED_BYTES

    @property
    def total(self) -> float:
        """All parts: the peak of a step, without what the allocator loses to fragmentation."""
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


def worst_total(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, recompute: Recompute) -> float:
    """Bytes of the fullest rank should every token of its EP group choose its experts: routing is learned, and nothing
    but a loss holds it in balance."""
    worst = dataclasses.replace(sizes, routing="worst")
    return max(largest_rank(shape, layout, way, recompute).total for way in (sizes, worst))


def weight_bytes(counts: ParameterCounts, sizes: RunSizes) -> int:
    """Routers are fp32 whatever the rest is."""
    in_fp8 = counts[ParameterKind.NEW_EXPERTS] if sizes.fp8_param_gather else 0
    wide = sum(count * _weight_size(kind, sizes) for kind, count in counts.items())
    return wide - in_fp8 * sizes.element_bytes + fp8_weight_bytes(counts, sizes)


def fp8_weight_bytes(counts: ParameterCounts, sizes: RunSizes) -> int:
    """FP8 keeps each layer's matrices twice more, as they are and transposed, since Hopper multiplies FP8 rows by rows
    alone. With --fp8-param-gather these two are all that the new experts have."""
    if sizes.precision != "fp8":
        return 0
    return 2 * sum(
        count
        for kind, count in counts.items()
        if kind not in (ParameterKind.ROUTER, ParameterKind.NORM, ParameterKind.EMBEDDING)
    )


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
    return FP32 if kind == ParameterKind.ROUTER else sizes.element_bytes


def _holders(kind: ParameterKind, layout: ParallelLayout, sizes: RunSizes) -> int:
    ranks = layout.model_parallel_size
    if kind in (ParameterKind.NEW_EXPERTS, ParameterKind.EARLIER_EXPERTS):
        ranks = layout.pipeline_model_parallel_size * layout.expert_model_parallel_size
        ranks *= layout.expert_tensor_parallel_size
    return sizes.gpus // ranks
