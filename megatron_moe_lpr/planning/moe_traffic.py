"""What a micro-batch sends in a MoE layer, with the original expert outside or inside the EP group."""

import dataclasses

from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.routing import Routing
from megatron_moe_lpr.planning.sizes import FP32, RunSizes
from megatron_moe_lpr.planning.traffic import Passes, Traffic, tensor_pair, tensor_unit

COUNT = 8
"""Bytes of a number of tokens."""


def moe_layer(
    shape: ModelShape,
    layout: ParallelLayout,
    sizes: RunSizes,
    passes: Passes,
    routing: Routing,
    layer: int,
    expert_rank: int,
    inside: bool,
) -> Traffic:
    """A micro-batch in a MoE layer."""
    experts, shares = shape.experts_per_layer[layer], routing.shares(shape, layer)
    tp, width = layout.tensor_model_parallel_size, shape.architecture.hidden_size * sizes.element_bytes
    reduced = 2 * (tp - 1) / tp
    dispatched = experts if inside else experts - 1
    others = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size - 1
    metadata = passes.ffn * COUNT * dispatched * others + FP32 * (experts + 1) * reduced
    tensor = 0.0
    if not inside:
        pair = tensor_pair(layout, sizes, passes.ffn, passes.backward, "original expert" in sizes.trains)
        tensor = tensor_unit(layout, sizes, shares[0] * shape.architecture.hidden_size * pair)
        metadata += passes.ffn * COUNT * reduced
    held = [sum(shares[expert] for expert in placed) for placed in placement(shape, layout, layer, inside)]
    away = sum(held[:expert_rank]) + sum(held[expert_rank + 1 :])
    exchange = _exchange(layout, sizes, passes, width, held[expert_rank], away)
    return dataclasses.replace(exchange, tensor=tensor, metadata=metadata)


def placement(shape: ModelShape, layout: ParallelLayout, layer: int, inside: bool = False) -> list[list[int]]:
    """Experts of a layer that each EP rank holds: an equal share of every expansion's, and inside the EP group rank 0
    the original one too."""
    ranks = layout.expert_model_parallel_size
    placed: list[list[int]] = [[0] if inside and rank == 0 else [] for rank in range(ranks)]
    first = 1
    for count in shape.expert_groups(layer):
        for rank in range(ranks):
            placed[rank] += range(first + rank * count // ranks, first + (rank + 1) * count // ranks)
        first += count
    return placed


def _exchange(
    layout: ParallelLayout, sizes: RunSizes, passes: Passes, width: float, own: float, away: float
) -> Traffic:
    """Dispatch and combine of a rank whose experts are in `own` of the tokens' choices, other ranks' in `away`."""
    ep, etp = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    tokens: float = sizes.micro_batch_size * sizes.seq_length
    if layout.uses_sequence_parallel:
        tokens /= layout.tensor_model_parallel_size
    sent, received = tokens * away, tokens * own * (ep - 1)
    gradients = width if passes.backward else 0.0
    # There and back, and the gradients there and back; weights travel with the tokens.
    forward = sent * (width + FP32) + received * width
    backward = sent * width + received * (gradients + FP32)
    # What expert TP ranks add up Megatron has in fp32, as the weights are (token_dispatcher.py `combine_preprocess`).
    wide = width / sizes.element_bytes * FP32
    rows = tokens * own * ep * (etp - 1)
    return Traffic(
        expert=passes.ffn * forward + backward,
        expert_tensor=rows * (passes.ffn * (width + FP32 + wide) + wide + gradients + FP32),
    )
