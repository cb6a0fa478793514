"""Bytes that a rank sends in one training step, from the shapes alone, by kind of parallelism.

Checked against every call of real ranks (tests/planning/test_communication.py) and of the emulated device
(tests/gpu/test_communication.py). Left out: scalars (losses, norms, flags, FP8's largest values; some hundred bytes a
step) and the rows by which the original expert's tokens are padded for FP8. The dispatcher is the all-to-all one.
"""

import dataclasses

from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.configuration.parameter_kinds import trained_in_layer
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.activations import Recompute
from megatron_moe_lpr.planning.gradient_traffic import gradient_traffic
from megatron_moe_lpr.planning.moe_traffic import moe_layer
from megatron_moe_lpr.planning.parameters import stage_layers
from megatron_moe_lpr.planning.routing import Routing
from megatron_moe_lpr.planning.sizes import FP32, RunSizes
from megatron_moe_lpr.planning.traffic import GPU, Habits, Passes, Traffic, tensor_pair, tensor_unit


def rank_traffic(
    shape: ModelShape,
    layout: ParallelLayout,
    sizes: RunSizes,
    recompute: Recompute,
    routing: Routing,
    stage: int = 0,
    expert_rank: int = 0,
    inside: bool = False,
    habits: Habits = GPU,
) -> Traffic:
    """What one rank sends in a step.

    Args:
        routing: the same on every rank.
        stage: pipeline stage of the rank.
        expert_rank: its place among the EP ranks.
        inside: the original expert, frozen, is one of rank 0's experts and its tokens are dispatched like the others',
            as in a stock MoE layer; else each rank has it, as here.
    """
    per_batch = _beside_layers(shape, layout, sizes, stage)
    for layer in stage_layers(shape, layout, stage):
        passes = _passes(shape, layout, sizes, recompute, layer, habits)
        trains = trained_in_layer(sizes.trains, layer in shape.inserted_blocks)
        per_batch += _attention(shape, layout, dataclasses.replace(sizes, trains=trains), passes)
        if shape.experts_per_layer[layer] == 1:
            per_batch += _dense_ffn(shape, layout, dataclasses.replace(sizes, trains=trains), passes)
        else:
            per_batch += moe_layer(shape, layout, sizes, passes, routing, layer, expert_rank, inside)
    batches = Traffic(*(sizes.num_microbatches(layout) * part for part in dataclasses.astuple(per_batch)))
    return batches + gradient_traffic(shape, layout, sizes, stage, habits)


def busiest_rank(
    shape: ModelShape,
    layout: ParallelLayout,
    sizes: RunSizes,
    recompute: Recompute,
    routing: Routing,
    inside: bool = False,
) -> Traffic:
    """On GPUs, of the pipeline stage that sends most; of each layer the EP rank that does, since all wait for it."""
    most = Traffic()
    for stage in range(layout.pipeline_model_parallel_size):
        traffic = rank_traffic(shape, layout, sizes, recompute, routing, stage, inside=inside)
        expert = expert_tensor = 0.0
        for layer in stage_layers(shape, layout, stage):
            if shape.experts_per_layer[layer] > 1:
                passes = _passes(shape, layout, sizes, recompute, layer, GPU)
                ranks = range(layout.expert_model_parallel_size)
                each = [moe_layer(shape, layout, sizes, passes, routing, layer, rank, inside) for rank in ranks]
                expert += max(one.expert for one in each)
                expert_tensor += max(one.expert_tensor for one in each)
        batches = sizes.num_microbatches(layout)
        traffic = dataclasses.replace(traffic, expert=expert * batches, expert_tensor=expert_tensor * batches)
        most = max(most, traffic, key=lambda one: one.total)
    return most


def _passes(
    shape: ModelShape,
    layout: ParallelLayout,
    sizes: RunSizes,
    recompute: Recompute,
    layer: int,
    habits: Habits,
) -> Passes:
    is_moe = shape.experts_per_layer[layer] > 1
    again = recompute == "full" or recompute == ("moe" if is_moe else "mlp")
    everywhere = (
        habits.gradient_of_embedding
        or recompute != "none"
        or layout.pipeline_model_parallel_size > 1
        or "embedding" in sizes.trains
    )
    # Below the lowest weight that trains nothing needs a gradient. Of a layer with a router that is the router, its
    # attention needs none; an inserted block begins with a norm.
    router_below = any(experts > 1 for experts in shape.experts_per_layer[:layer])
    inserted = "inserted blocks" in sizes.trains and any(block <= layer for block in shape.inserted_blocks)
    return Passes(2 if recompute == "full" else 1, 2 if again else 1, everywhere or router_below or inserted)


def _attention(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, passes: Passes) -> Traffic:
    pair = tensor_pair(layout, sizes, passes.attention, passes.backward, "attention" in sizes.trains)
    return Traffic(tensor=tensor_unit(layout, sizes, shape.architecture.hidden_size * pair))


def _dense_ffn(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, passes: Passes) -> Traffic:
    pair = tensor_pair(layout, sizes, passes.ffn, passes.backward, "dense FFN" in sizes.trains)
    return Traffic(tensor=tensor_unit(layout, sizes, shape.architecture.hidden_size * pair))


def _beside_layers(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, stage: int) -> Traffic:
    """Embedding, output matrix and loss over the TP ranks; what a micro-batch sends to the next and previous stages."""
    stages, chunks = layout.pipeline_model_parallel_size, layout.num_virtual_stages_per_pipeline_rank
    width = shape.architecture.hidden_size * sizes.element_bytes
    sequence, trains = layout.uses_sequence_parallel, "embedding" in sizes.trains
    units = 0
    tensor = 0.0
    if stage == 0:
        units += 2 if not sequence else 1 + int(trains)
    if stage == stages - 1:
        units += 2 + int(trains and sequence)
        # Largest logit, the target's, and the sum of exponentials, each in fp32.
        tensor = 3 * 2 * tensor_unit(layout, sizes, FP32)
    tensor += units * tensor_unit(layout, sizes, width)
    if stages == 1:
        return Traffic(tensor=tensor)
    tokens = sizes.micro_batch_size * sizes.seq_length
    if sequence:
        tokens //= layout.tensor_model_parallel_size
    messages = 2 * chunks - int(stage == 0) - int(stage == stages - 1)
    return Traffic(tensor=tensor, pipeline=messages * tokens * width)
