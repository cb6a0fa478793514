"""What a rank sends once a step: gradients of what trains, and the parameters' return."""

import math

from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind, trained_in_layer
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.parameters import (
    layer_parameters,
    stage_layers,
    stage_parameters,
    vocabulary_matrix,
)
from megatron_moe_lpr.planning.sizes import FP32, RunSizes
from megatron_moe_lpr.planning.traffic import Habits, Traffic

BUFFER_DIVISOR = 128
"""Under the distributed optimizer a gradient buffer is padded to a multiple of this and of its ranks."""


def gradient_traffic(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, stage: int, habits: Habits) -> Traffic:
    """Of a rank of a pipeline stage."""
    counts = stage_parameters(shape, layout, stage)
    trained = {kind: count for kind, count in counts.items() if kind in sizes.trains and count}
    ranks = sizes.gpus // layout.pipeline_model_parallel_size
    data = ranks // layout.tensor_model_parallel_size
    expert_data = ranks // (layout.expert_model_parallel_size * layout.expert_tensor_parallel_size)
    experts = trained.pop(ParameterKind.NEW_EXPERTS, 0) + trained.pop(ParameterKind.EARLIER_EXPERTS, 0)
    gathers = 1 if habits.overlap_param_gather or not (experts and trained) else 2
    buffers = _buffers(trained, sizes)
    of_experts = 1 if sizes.fp8_param_gather else sizes.element_bytes
    return Traffic(
        data=sum(_reduced(size, element, data, sizes, gathers) for size, element in buffers),
        expert_data=_reduced(experts, of_experts, expert_data, sizes, gathers),
        tensor=_replicated(shape, layout, stage, trained),
        pipeline=_tied(shape, layout, stage, trained),
    )


def _buffers(trained: dict[ParameterKind, int], sizes: RunSizes) -> list[tuple[int, int]]:
    """Parameters and bytes of one, a buffer for each format of weights; routers are fp32."""
    total, routers = sum(trained.values()), trained.get(ParameterKind.ROUTER, 0)
    if sizes.element_bytes == FP32:
        return [(total, FP32)]
    return [(routers, FP32), (total - routers, sizes.element_bytes)]


def _tied(shape: ModelShape, layout: ParallelLayout, stage: int, trained: dict[ParameterKind, int]) -> float:
    """Between the first and the last stage, each with a copy of the embedding."""
    last = layout.pipeline_model_parallel_size - 1
    if (
        last == 0
        or stage not in (0, last)
        or ParameterKind.EMBEDDING not in trained
        or not shape.architecture.tied_embeddings
    ):
        return 0.0
    return FP32 * vocabulary_matrix(shape, layout)


def _reduced(size: int, element: int, ranks: int, sizes: RunSizes, gathers: int) -> float:
    """fp32 gradients of a buffer over the ranks that hold the same parameters, and the parameters' return."""
    if not sizes.distributed_optimizer:
        return 2 * FP32 * size * (ranks - 1) / ranks
    divisor = math.lcm(ranks, BUFFER_DIVISOR)
    padded = math.ceil(size / divisor) * divisor
    return (FP32 + gathers * element) * padded * (ranks - 1) / ranks


def _replicated(shape: ModelShape, layout: ParallelLayout, stage: int, trained: dict[ParameterKind, int]) -> float:
    """Gradients that TP ranks add up: of what each has whole and, under SP, computed from its part of the sequence."""
    tp, architecture = layout.tensor_model_parallel_size, shape.architecture
    whole = trained.get(ParameterKind.ROUTER, 0) + trained.get(ParameterKind.NORM, 0)
    layers = stage_layers(shape, layout, stage)
    if ParameterKind.INSERTED_BLOCKS in trained:
        inserted = [layer for layer in layers if layer in shape.inserted_blocks]
        whole += sum(layer_parameters(shape, 1, layout)[ParameterKind.NORM] for _ in inserted)
    if not layout.uses_sequence_parallel:
        # Norms of queries and keys, which each rank has for its own heads.
        of_layer = 2 * architecture.head_dim if architecture.family.qk_norm else 0
        whole = of_layer * sum(
            ParameterKind.NORM in trained_in_layer(trained, layer in shape.inserted_blocks) for layer in layers
        )
    return FP32 * whole * 2 * (tp - 1) / tp
