"""Bytes that a rank sends in one training step, from the shapes alone, by kind of parallelism.

Sent bytes are those a rank hands to others: of a gather over g ranks its own piece g - 1 times, of a reduce-scatter all
pieces but its own, of an all-reduce both. NCCL's rings send as many. Checked against every call of real ranks
(tests/planning/test_communication.py) and of the emulated device (tests/gpu/test_communication.py).

Left out: scalars (losses, norms, flags, FP8's largest values; some hundred bytes a step) and the rows by which the
original expert's tokens are padded for FP8. The dispatcher is the all-to-all one.
"""

import dataclasses
import math

from megatron_moe_lpr.model.config import ModelShape
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.activations import BLOCK, Recompute
from megatron_moe_lpr.planning.parameters import stage_layers, stage_parameters, vocabulary_matrix
from megatron_moe_lpr.planning.routing import Routing
from megatron_moe_lpr.planning.sizes import FP32, RunSizes

COUNT = 8
"""Bytes of a number of tokens."""
BUFFER_DIVISOR = 128
"""Under the distributed optimizer a gradient buffer is padded to a multiple of this and of its ranks."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step."""

    data: float = 0.0
    """Gradients and parameters over the data-parallel ranks, without the experts'."""
    expert_data: float = 0.0
    """The experts', over the ranks that hold the same ones."""
    tensor: float = 0.0
    """Activations and their gradients over the TP ranks, the original expert's among them; gradients of routers."""
    expert: float = 0.0
    """Tokens and their weights over the EP ranks: dispatch and combine, forward and backward."""
    expert_tensor: float = 0.0
    """Tokens over the ranks that share an expert's matrices."""
    pipeline: float = 0.0
    """Activations and their gradients between stages; gradients of tied embeddings."""
    metadata: float = 0.0
    """Numbers of tokens: over the EP ranks what will come, over the TP ranks what router and original expert had."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def total(self) -> float:
        """All kinds."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Habits:
    """What else than shapes and layout decides: the platforms differ in it."""

    gradient_of_embedding: bool = True
    """Input gradients are computed down to the embedding's output, although nothing trains there. On GPUs always; on
    CPUs with recompute or PP, else only down to the lowest layer that trains something (model/gpt.py)."""
    overlap_param_gather: bool = True
    """Parameters are gathered once. Otherwise Megatron gathers all of them after each of its optimizers, that of the
    experts and that of the rest (distrib_optimizer.py `step_with_ready_grads`)."""


GPU, CPU = Habits(), Habits(gradient_of_embedding=False, overlap_param_gather=False)


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
        inside: the original expert is one of rank 0's experts and its tokens are dispatched like the others', as in a
            stock MoE layer; else each rank has it, as here.
    """
    layers = stage_layers(shape, layout, stage)
    per_batch = _beside_layers(shape, layout, sizes, stage)
    for layer in layers:
        passes = _passes(shape, layout, sizes, recompute, layer, habits)
        per_batch += _attention(shape, layout, sizes, passes)
        if shape.experts_per_layer[layer] == 1:
            per_batch += _dense_ffn(shape, layout, sizes, passes)
        else:
            per_batch += moe_layer(shape, layout, sizes, passes, routing, layer, expert_rank, inside)
    batches = Traffic(*(sizes.num_microbatches(layout) * part for part in dataclasses.astuple(per_batch)))
    return batches + _gradients(shape, layout, sizes, stage, habits)


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
        exchanged = 0.0
        for layer in stage_layers(shape, layout, stage):
            if shape.experts_per_layer[layer] > 1:
                passes = _passes(shape, layout, sizes, recompute, layer, GPU)
                exchanged += max(
                    moe_layer(shape, layout, sizes, passes, routing, layer, rank, inside).expert
                    for rank in range(layout.expert_model_parallel_size)
                )
        traffic = dataclasses.replace(traffic, expert=exchanged * sizes.num_microbatches(layout))
        most = max(most, traffic, key=lambda one: one.total)
    return most


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often a layer's parts are computed for a micro-batch."""

    attention: int = 1
    ffn: int = 1
    backward: bool = True
    """Gradients reach the layer's input; False: not even those of its FFN's input, only its router's and experts'."""
    any_backward: bool = True
    """Something in the layer has gradients at all."""


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
    lowest = (
        next(index for index, experts in enumerate(shape.experts_per_layer) if experts > 1) if not everywhere else 0
    )
    return Passes(
        attention=2 if recompute == "full" else 1,
        ffn=2 if again else 1,
        backward=everywhere or layer > lowest,
        any_backward=everywhere or layer >= lowest,
    )


def _unit(layout: ParallelLayout, sizes: RunSizes, width: float) -> float:
    """A gather or a reduce-scatter of a micro-batch over the TP ranks. An all-reduce is two of them."""
    tp = layout.tensor_model_parallel_size
    return sizes.micro_batch_size * sizes.seq_length / tp * width * (tp - 1)


def _pair(layout: ParallelLayout, sizes: RunSizes, forward: int, backward: bool, trains: bool) -> float:
    """Bytes for each value of the input of a matrix split by columns and one split by rows after it.

    Under SP the input is gathered before and the output scattered after, and so their gradients; for weight gradients
    the input is gathered again. Transformer Engine gathers in FP8, blockwise the gradient for each product anew.
    """
    scattered = gathered = float(sizes.element_bytes)
    if not layout.uses_sequence_parallel:
        return 2 * scattered * (forward + backward)
    again = 1 if trains else 0
    if sizes.precision == "fp8":
        blockwise = sizes.fp8_recipe == "blockwise"
        gathered = 1 + FP32 / BLOCK if blockwise else 1.0
        again *= 2 if blockwise else 1
    return forward * (gathered + scattered) + backward * (gathered * (1 + again) + scattered)


def _attention(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, passes: Passes) -> Traffic:
    pair = _pair(layout, sizes, passes.attention, passes.backward, "attention" in sizes.trains)
    return Traffic(tensor=_unit(layout, sizes, shape.architecture.hidden_size * pair))


def _dense_ffn(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, passes: Passes) -> Traffic:
    pair = _pair(layout, sizes, passes.ffn, passes.backward, "dense FFN" in sizes.trains)
    return Traffic(tensor=_unit(layout, sizes, shape.architecture.hidden_size * pair))


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
        pair = _pair(layout, sizes, passes.ffn, passes.backward, "original expert" in sizes.trains)
        tensor = _unit(layout, sizes, shares[0] * shape.architecture.hidden_size * pair)
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
    tokens = sizes.micro_batch_size * sizes.seq_length
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
        expert=passes.ffn * forward + (backward if passes.any_backward else 0.0),
        expert_tensor=rows * (passes.ffn * (width + FP32 + wide) + wide + gradients + FP32),
    )


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
        tensor = 3 * 2 * _unit(layout, sizes, FP32)
    tensor += units * _unit(layout, sizes, width)
    if stages == 1:
        return Traffic(tensor=tensor)
    tokens = sizes.micro_batch_size * sizes.seq_length
    if sequence:
        tokens //= layout.tensor_model_parallel_size
    messages = 2 * chunks - int(stage == 0) - int(stage == stages - 1)
    return Traffic(tensor=tensor, pipeline=messages * tokens * width)


def _gradients(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, stage: int, habits: Habits) -> Traffic:
    """Once a step."""
    counts = stage_parameters(shape, layout, stage)
    trained = {kind: count for kind, count in counts.items() if kind in sizes.trains and count}
    ranks = sizes.gpus // layout.pipeline_model_parallel_size
    data = ranks // layout.tensor_model_parallel_size
    expert_data = ranks // (layout.expert_model_parallel_size * layout.expert_tensor_parallel_size)
    experts = [trained.pop(kind, 0) for kind in ("new experts", "earlier experts")]
    optimizers = 2 if any(experts) and trained else 1
    gathers = 1 if habits.overlap_param_gather else optimizers
    routers = trained.get("router", 0)
    # A buffer for each format of the weights; routers are fp32.
    buffers = [(sum(trained.values()), FP32)]
    if sizes.element_bytes != FP32:
        buffers = [(routers, FP32), (sum(trained.values()) - routers, sizes.element_bytes)]
    pipeline = 0.0
    stages = layout.pipeline_model_parallel_size
    if stages > 1 and shape.architecture.tied_embeddings and "embedding" in trained and stage in (0, stages - 1):
        pipeline = FP32 * vocabulary_matrix(shape, layout)
    return Traffic(
        data=sum(_reduced(size, element, data, sizes, gathers) for size, element in buffers),
        expert_data=_reduced(
            sum(experts), 1 if sizes.fp8_param_gather else sizes.element_bytes, expert_data, sizes, gathers
        ),
        tensor=_replicated(shape, layout, stage, trained),
        pipeline=pipeline,
    )


def _reduced(size: int, element: int, ranks: int, sizes: RunSizes, gathers: int) -> float:
    """fp32 gradients of a buffer over the ranks that hold the same parameters, and the parameters' return."""
    if not sizes.distributed_optimizer:
        return 2 * FP32 * size * (ranks - 1) / ranks
    divisor = math.lcm(ranks, BUFFER_DIVISOR)
    padded = math.ceil(size / divisor) * divisor
    return (FP32 + gathers * element) * padded * (ranks - 1) / ranks


def _replicated(shape: ModelShape, layout: ParallelLayout, stage: int, trained: dict) -> float:
    """Gradients that TP ranks add up: of what each has whole and, under SP, computed from its part of the sequence."""
    tp = layout.tensor_model_parallel_size
    whole = trained.get("router", 0) + trained.get("norm", 0)
    if not layout.uses_sequence_parallel:
        heads = 2 * shape.architecture.head_dim if shape.architecture.family.qk_norm and "norm" in trained else 0
        whole = heads * len(stage_layers(shape, layout, stage))
    return FP32 * whole * 2 * (tp - 1) / tp
