"""Memory of one rank, by part.

Weights, gradients and optimizer state follow from the code and are checked against real allocations (tests/planning).
Weights in FP8, activations and logits are checked on Transformer Engine's emulation (tests/gpu/test_memory.py).
"""

import dataclasses
from collections.abc import Collection

from megatron_moe_lpr.model.configuration.parameter_kinds import VOCABULARY, ParameterKind
from megatron_moe_lpr.model.parameter_counts import ParameterCounts
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.activations import activation_bytes, logit_bytes
from megatron_moe_lpr.planning.parameters import rank_parameters
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.sizes import FP32, RunSizes

GIB = 2**30
RESERVED_BYTES = 2 * GIB
"""CUDA context, NCCL's buffers and workspaces of the libraries: an assumption, not measured."""


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept activations, and what a layer's backward pass needs beyond the logits' memory."""
    logits: float
    reserved: float = RESERVED_BYTES

    @property
    def total(self) -> float:
        """Peak of a step, without what the allocator loses to fragmentation."""
        return sum(dataclasses.astuple(self))


def largest_rank(run: PlannedRun) -> RankMemory:
    """Memory of a rank of the pipeline rank that needs most."""
    return max((rank_memory(run, pipeline_rank) for pipeline_rank in run.pipeline_ranks), key=lambda rank: rank.total)


def rank_memory(run: PlannedRun, pipeline_rank: int) -> RankMemory:
    """Memory of one rank, under balanced or worst-case routing as `run.sizes` has it."""
    counts = rank_parameters(run.shape, run.layout, pipeline_rank)
    return RankMemory(
        weights=weight_bytes(counts, run.sizes),
        gradients=gradient_bytes(counts, run.sizes.trains),
        optimizer=optimizer_bytes(counts, run.layout, run.sizes),
        activations=activation_bytes(run, pipeline_rank),
        logits=logit_bytes(run, pipeline_rank),
    )


def worst_total(run: PlannedRun) -> float:
    """Bytes of the fullest rank should every token of its EP group choose its experts: routing is learned, and only
    the load balancing loss keeps it even."""
    worst = dataclasses.replace(run, sizes=dataclasses.replace(run.sizes, routing="worst"))
    return max(largest_rank(run).total, largest_rank(worst).total)


def weight_bytes(counts: ParameterCounts, sizes: RunSizes) -> int:
    """Bytes of a rank's weights and of their FP8 copies; routers are always fp32."""
    in_fp8 = counts[ParameterKind.NEW_EXPERTS] if sizes.fp8_param_gather else 0
    wide = sum(count * _weight_size(kind, sizes) for kind, count in counts.items())
    return wide - in_fp8 * sizes.element_bytes + fp8_weight_bytes(counts, sizes)


def fp8_weight_bytes(counts: ParameterCounts, sizes: RunSizes) -> int:
    """Bytes of the FP8 copies of a rank's matrices: one as it is and one transposed, since Hopper multiplies FP8 rows
    only by rows. With --fp8-param-gather the new experts have these two and no bf16 weight."""
    if sizes.precision != "fp8":
        return 0
    without = {ParameterKind.ROUTER, ParameterKind.NORM} | VOCABULARY
    return 2 * sum(count for kind, count in counts.items() if kind not in without)


def gradient_bytes(counts: ParameterCounts, trains: Collection[ParameterKind]) -> int:
    """Bytes of the fp32 gradient buffer, which has a place for each parameter that trains."""
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
    return FP32 if kind is ParameterKind.ROUTER else sizes.element_bytes


def _holders(kind: ParameterKind, layout: ParallelLayout, sizes: RunSizes) -> int:
    """Ranks that hold the same parameters of a kind."""
    ranks = layout.model_parallel_size
    if kind.is_expert_parallel:
        ranks = layout.pipeline_model_parallel_size * layout.expert_model_parallel_size
        ranks *= layout.expert_tensor_parallel_size
    return sizes.gpus // ranks
