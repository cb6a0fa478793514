"""What a rank sends once a step: gradients of what trains, and the updated parameters."""

import math
from collections.abc import Mapping

from megatron_moe_lpr.model.parameter_kinds import ParameterKind
from megatron_moe_lpr.planning.parameters import layer_parameters, rank_parameters, vocabulary_matrix
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.sizes import FP32, RunSizes
from megatron_moe_lpr.planning.traffic import PlatformBehaviour, Traffic

BUFFER_DIVISOR = 128
"""Under the distributed optimizer a gradient buffer is padded to a multiple of this and of its ranks."""


def gradient_traffic(run: PlannedRun, pipeline_rank: int, behaviour: PlatformBehaviour) -> Traffic:
    """Bytes that a rank sends after the backward passes of a step."""
    layout, sizes = run.layout, run.sizes
    counts = rank_parameters(run.shape, layout, pipeline_rank)
    trained = {kind: count for kind, count in counts.items() if kind in sizes.trains and count}
    ranks = sizes.gpus // layout.pipeline_model_parallel_size
    data = ranks // layout.tensor_model_parallel_size
    expert_data = ranks // (layout.expert_model_parallel_size * layout.expert_tensor_parallel_size)
    experts = trained.pop("new experts", 0) + trained.pop("earlier experts", 0)
    gathers = 1 if behaviour.overlap_param_gather or not (experts and trained) else 2
    expert_element = 1 if sizes.fp8_param_gather else sizes.element_bytes
    return Traffic(
        data=sum(_reduced(size, element, data, sizes, gathers) for size, element in _buffers(trained, sizes)),
        expert_data=_reduced(experts, expert_element, expert_data, sizes, gathers),
        tensor=_replicated(run, pipeline_rank, trained),
        pipeline=_tied(run, pipeline_rank, trained),
    )


def _buffers(trained: Mapping[ParameterKind, int], sizes: RunSizes) -> list[tuple[int, int]]:
    """Parameters of each gradient buffer and bytes of one: a buffer for each format of weights; routers are fp32."""
    total, routers = sum(trained.values()), trained.get("router", 0)
    if sizes.element_bytes == FP32:
        return [(total, FP32)]
    return [(routers, FP32), (total - routers, sizes.element_bytes)]


def _tied(run: PlannedRun, pipeline_rank: int, trained: Mapping[ParameterKind, int]) -> float:
    """Gradients of tied embeddings, added up between the first and the last pipeline rank, each with a copy."""
    last = run.layout.pipeline_model_parallel_size - 1
    tied = run.shape.architecture.tied_embeddings
    if last == 0 or pipeline_rank not in (0, last) or "embedding" not in trained or not tied:
        return 0.0
    return FP32 * vocabulary_matrix(run.shape, run.layout)


def _reduced(size: int, element: int, ranks: int, sizes: RunSizes, gathers: int) -> float:
    """fp32 gradients of a buffer over the ranks that hold the same parameters, and gathers of updated parameters."""
    if not sizes.distributed_optimizer:
        return 2 * FP32 * size * (ranks - 1) / ranks
    divisor = math.lcm(ranks, BUFFER_DIVISOR)
    padded = math.ceil(size / divisor) * divisor
    return (FP32 + gathers * element) * padded * (ranks - 1) / ranks


def _replicated(run: PlannedRun, pipeline_rank: int, trained: Mapping[ParameterKind, int]) -> float:
    """Gradients that TP ranks add up: of parameters that each holds whole and uses for a part of the tokens (SP)."""
    TP, architecture, layers = run.layout.tensor_model_parallel_size, run.shape.architecture, run.layers(pipeline_rank)
    whole = trained.get("router", 0) + trained.get("norm", 0)
    if "inserted blocks" in trained:
        inserted = [layer for layer in layers if layer.index in run.shape.inserted_blocks]
        whole += len(inserted) * layer_parameters(run.shape, 1, run.layout)["norm"]
    if not run.layout.uses_sequence_parallel:
        # Only norms of queries and keys, which each rank uses for its own heads.
        qk_norms = 2 * architecture.head_dim if architecture.family.qk_norm else 0
        whole = qk_norms * sum("norm" in layer.trains for layer in layers)
    return FP32 * whole * 2 * (TP - 1) / TP
