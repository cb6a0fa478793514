"""What a micro-batch sends in a MoE layer, with the original expert on every rank or inside the EP group."""

import dataclasses

from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.planning.planned_run import PlannedLayer, PlannedRun
from megatron_moe_lpr.planning.routing import Routing
from megatron_moe_lpr.planning.sizes import FP32
from megatron_moe_lpr.planning.traffic import Passes, Traffic, tensor_pair, tensor_unit

COUNT = 8
"""Bytes of a token count (int64)."""


def moe_layer_traffic(
    layer: PlannedLayer, passes: Passes, routing: Routing, expert_rank: int, original_in_ep_group: bool
) -> Traffic:
    """Bytes that the EP rank `expert_rank` sends for a micro-batch in a MoE layer.

    Args:
        original_in_ep_group: as in a stock MoE layer; see `communication.rank_traffic`.
    """
    run = layer.run
    E, TP, shares = layer.num_experts, run.layout.tensor_model_parallel_size, routing.shares(run.shape, layer.index)
    all_reduce, token_ranks = 2 * (TP - 1) / TP, TP * run.layout.context_parallel_size
    dispatched = E if original_in_ep_group else layer.spread_experts
    other_ranks = run.layout.expert_model_parallel_size * run.layout.expert_tensor_parallel_size - 1
    # The router adds up the shares of the experts over the TP and CP ranks, for the load balancing loss or a log, and
    # the dispatcher gathers the tokens of each expert.
    metadata = passes.ffn * COUNT * dispatched * other_ranks + FP32 * E * 2 * (token_ranks - 1) / token_ranks
    tensor = 0.0
    if layer.has_expert_apart and not original_in_ep_group:
        pair = tensor_pair(run, passes.ffn, passes.backward, ParameterKind.ORIGINAL_EXPERT in layer.trains)
        tensor = tensor_unit(run, shares[0] * layer.architecture.hidden_size * pair)
        metadata += passes.ffn * COUNT * all_reduce
    if layer.shared_expert_size:
        pair = tensor_pair(run, passes.ffn, passes.backward, ParameterKind.SHARED_EXPERT in layer.trains)
        tensor += tensor_unit(run, layer.architecture.hidden_size * pair)
    held = [sum(shares[expert] for expert in experts) for experts in placement(layer, original_in_ep_group)]
    away = sum(held[:expert_rank]) + sum(held[expert_rank + 1 :])
    exchange = _exchange(run, passes, held[expert_rank], away)
    return dataclasses.replace(exchange, tensor=tensor, metadata=metadata)


def placement(layer: PlannedLayer, original_in_ep_group: bool = False) -> list[list[int]]:
    """Experts that each EP rank holds: an equal part of a mixture base's and of every expansion's, and inside the EP
    group rank 0 a single original one too."""
    EP, apart = layer.run.layout.expert_model_parallel_size, layer.has_expert_apart
    placed: list[list[int]] = [[0] if apart and original_in_ep_group and rank == 0 else [] for rank in range(EP)]
    base = 0 if apart else layer.run.shape.base_experts(layer.index)
    first = 1 if apart else 0
    for count in (base, *layer.run.shape.expert_groups(layer.index)):
        for rank in range(EP):
            placed[rank] += range(first + rank * count // EP, first + (rank + 1) * count // EP)
        first += count
    return placed


def _exchange(run: PlannedRun, passes: Passes, own: float, away: float) -> Traffic:
    """Dispatch and combine.

    Args:
        own: choices of a token, on average, that fall on the rank's own experts.
        away: choices of a token that fall on other ranks' experts.
    """
    EP, ETP = run.layout.expert_model_parallel_size, run.layout.expert_tensor_parallel_size
    width = run.hidden_bytes
    tokens: float = run.sizes.micro_batch_size * run.own_length
    if run.layout.uses_sequence_parallel:
        tokens /= run.layout.tensor_model_parallel_size
    sent, received = tokens * away, tokens * own * (EP - 1)
    gradients = width if passes.backward else 0.0
    # Tokens with their weights go out and outputs come back; so do their gradients, in the opposite direction.
    forward = sent * (width + FP32) + received * width
    backward = sent * width + received * (gradients + FP32)
    # ETP ranks add up outputs in fp32, as Megatron has the weights (token_dispatcher.py `combine_preprocess`).
    wide = width / run.sizes.element_bytes * FP32
    rows = tokens * own * EP * (ETP - 1)
    return Traffic(
        expert=passes.ffn * forward + backward,
        expert_tensor=rows * (passes.ffn * (width + FP32 + wide) + wide + gradients + FP32),
    )
