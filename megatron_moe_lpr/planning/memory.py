"""Memory of one rank, by part.

Weights, gradients and optimizer state follow from the code and are checked against real allocations (tests/planning).
Weights in FP8, activations and logits are checked on Transformer Engine's emulation (tests/gpu/test_memory.py).
"""

import dataclasses
import math

from megatron_moe_lpr.model.configuration.parameter_kinds import VOCABULARY, ParameterKind
from megatron_moe_lpr.model.parameter_counts import ParameterCounts
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.activations import activation_bytes, logit_bytes
from megatron_moe_lpr.planning.optimizer_states import copy_size, gradient_size, moments_size, weight_size
from megatron_moe_lpr.planning.parameters import held_parameters, rank_parameters
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.sizes import RunSizes

GIB = 2**30
UNFUSED = (ParameterKind.ROUTER, ParameterKind.BASE_ROUTER, ParameterKind.EMBEDDING)
"""Kinds whose matrices are not Transformer Engine's: their gradients are added to the buffer by Megatron's hook."""
RESERVED_BYTES = 2 * GIB
"""CUDA context, NCCL's buffers and workspaces of the libraries: an assumption, not measured."""


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank."""

    weights: float
    gradients: float
    """The fp32 buffer, and placeholders of weight gradients."""
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
        gradients=gradient_bytes(counts, run.sizes) + placeholder_bytes(run, pipeline_rank),
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
    wide = sum(count * weight_size(kind, sizes) for kind, count in counts.items())
    return wide - in_fp8 * sizes.element_bytes + fp8_weight_bytes(counts, sizes)


def fp8_weight_bytes(counts: ParameterCounts, sizes: RunSizes) -> int:
    """Bytes of the FP8 copies of a rank's matrices: one as it is and one transposed, since Hopper multiplies FP8 rows
    only by rows. With --fp8-param-gather the new experts have these two and no bf16 weight."""
    if sizes.precision != "fp8":
        return 0
    without = {ParameterKind.ROUTER, ParameterKind.BASE_ROUTER, ParameterKind.NORM} | VOCABULARY
    return 2 * sum(count for kind, count in counts.items() if kind not in without)


def gradient_bytes(counts: ParameterCounts, sizes: RunSizes) -> int:
    """Bytes of the gradient buffers, which have a place for each parameter that trains."""
    return sum(gradient_size(kind, sizes) * count for kind, count in counts.items() if kind in sizes.trains)


def placeholder_bytes(run: PlannedRun, pipeline_rank: int) -> int:
    """Bytes of what autograd is given in the place of weight gradients that a product has added to the buffer: a tensor
    without values, one for all matrices of a shape (Transformer Engine, base.py `get_dummy_wgrad`)."""
    shapes = {
        parameter.rank_shape(run.layout)
        for parameter in held_parameters(run.shape, run.layout, pipeline_rank)
        if parameter.kind in run.sizes.trains and parameter.is_product and parameter.kind not in UNFUSED
    }
    return run.sizes.element_bytes * sum(map(math.prod, shapes))


def optimizer_bytes(counts: ParameterCounts, layout: ParallelLayout, sizes: RunSizes) -> float:
    """AdamW's two moments and, for weights that are not fp32 themselves, an fp32 copy; split over the ranks that hold
    the same parameters under the distributed optimizer. None of it where it lies on the host."""
    total = 0.0
    if sizes.states.optimizer_cpu_offload:
        return total
    for kind in sizes.trains:
        one = moments_size(sizes) + copy_size(kind, sizes)
        total += one * counts[kind] / (holders(kind, layout, sizes) if sizes.distributed_optimizer else 1)
    return total


def holders(kind: ParameterKind, layout: ParallelLayout, sizes: RunSizes) -> int:
    """Ranks that hold the same parameters of a kind."""
    ranks = layout.model_parallel_size
    if kind.is_expert_parallel:
        ranks = layout.pipeline_model_parallel_size * layout.expert_model_parallel_size
        ranks *= layout.expert_tensor_parallel_size
    return sizes.gpus // ranks
