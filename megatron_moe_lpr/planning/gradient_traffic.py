"""What a rank sends once a step: gradients of what trains, and the updated parameters."""

import math
from collections.abc import Mapping

from megatron_moe_lpr.model.configuration.parameter_kinds import VOCABULARY, ParameterKind
from megatron_moe_lpr.planning.optimizer_states import gradient_size
from megatron_moe_lpr.planning.parameters import held_parameters, rank_parameters
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.sizes import FP32, RunSizes
from megatron_moe_lpr.planning.traffic import PlatformBehaviour, Traffic

BUFFER_DIVISOR = 128
"""Under the distributed optimizer a gradient buffer is padded to a multiple of this and of its ranks."""

QK_NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")


def gradient_traffic(run: PlannedRun, pipeline_rank: int, behaviour: PlatformBehaviour) -> Traffic:
    """Bytes that a rank sends after the backward passes of a step."""
    layout, sizes = run.layout, run.sizes
    counts = rank_parameters(run.shape, layout, pipeline_rank)
    trained = {kind: count for kind, count in counts.items() if kind in sizes.trains and count}
    ranks = sizes.gpus // layout.pipeline_model_parallel_size
    data = ranks // layout.tensor_model_parallel_size
    expert_data = ranks // (layout.expert_model_parallel_size * layout.expert_tensor_parallel_size)
    experts = sum(trained.pop(kind) for kind in [*trained] if kind.is_expert_parallel)
    gathers = 1 if behaviour.overlap_param_gather or not (experts and trained) else 2
    expert_element = 1 if sizes.fp8_param_gather else sizes.element_bytes
    return Traffic(
        data=sum(_reduced(*buffer, data, sizes, gathers) for buffer in _buffers(trained, sizes)),
        expert_data=_reduced(
            experts, expert_element, gradient_size(ParameterKind.NEW_EXPERTS, sizes), expert_data, sizes, gathers
        ),
        tensor=_replicated(run, pipeline_rank),
        pipeline=_tied(run, pipeline_rank, trained),
    )


def _buffers(trained: Mapping[ParameterKind, int], sizes: RunSizes) -> list[tuple[int, int, int]]:
    """Parameters of each gradient buffer, bytes of one and of its gradient: a buffer for each format of weights;
    routers are fp32."""
    total, routers = sum(trained.values()), sum(count for kind, count in trained.items() if kind.is_router)
    if sizes.element_bytes == FP32:
        return [(total, FP32, FP32)]
    gradient = gradient_size(ParameterKind.NEW_EXPERTS, sizes)
    return [(routers, FP32, FP32), (total - routers, sizes.element_bytes, gradient)]


def _tied(run: PlannedRun, pipeline_rank: int, trained: Mapping[ParameterKind, int]) -> float:
    """Gradients of tied embeddings, added up between the first and the last pipeline rank, each with a copy."""
    last = run.layout.pipeline_model_parallel_size - 1
    tied = run.shape.architecture.tied_embeddings
    if last == 0 or pipeline_rank not in (0, last) or not tied:
        return 0.0
    return sum(gradient_size(kind, run.sizes) * trained.get(kind, 0) for kind in VOCABULARY)


def _reduced(size: int, element: int, gradient: int, ranks: int, sizes: RunSizes, gathers: int) -> float:
    """Gradients of a buffer over the ranks that hold the same parameters, and gathers of updated parameters."""
    if not sizes.distributed_optimizer:
        return 2 * gradient * size * (ranks - 1) / ranks
    divisor = math.lcm(ranks, BUFFER_DIVISOR)
    padded = math.ceil(size / divisor) * divisor
    return (gradient + gathers * element) * padded * (ranks - 1) / ranks


def _replicated(run: PlannedRun, pipeline_rank: int) -> float:
    """Gradients that TP ranks add up: of parameters that each holds whole and uses for a part of the tokens (SP)."""
    TP = run.layout.tensor_model_parallel_size
    held = held_parameters(run.shape, run.layout, pipeline_rank)
    whole = [parameter for parameter in held if parameter.split is None and parameter.kind in run.sizes.trains]
    if not run.layout.uses_sequence_parallel:
        # Only norms of queries and keys, which each rank uses for its own heads.
        whole = [parameter for parameter in whole if parameter.name in QK_NORMS]
    size = sum(gradient_size(parameter.kind, run.sizes) * parameter.size for parameter in whole)
    return size * 2 * (TP - 1) / TP
