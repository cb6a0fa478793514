"""Activations of one rank: what the backward pass will need, from the shapes alone.

The bytes are those that Transformer Engine's layers keep, checked case by case against the tensors that a step really
holds on its emulation (docs/planning.md). A frozen matrix does not keep its input, since it has no weight gradient.
Left out: the rows by which each expert's tokens are padded for FP8, at most 15 an expert (with blockwise under TP 127).
"""

import dataclasses
from typing import Literal

from megatron_moe_lpr.model.build import padded_vocab_size
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.configuration.parameter_kinds import trained_in_layer
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.parameters import stage_layers
from megatron_moe_lpr.planning.sizes import FP32, RunSizes

Recompute = Literal["none", "core_attn", "layernorm", "moe_act", "mlp", "moe", "full"]
"""none: keep all; full: whole layers again (`--recompute-granularity full`); the others: one module of
`--recompute-granularity selective --recompute-modules ...`."""
BLOCK = 128
"""Values that share a scale under the recipe blockwise."""


@dataclasses.dataclass(frozen=True)
class LayerExperts:
    """Experts of a layer."""

    count: int
    """The original one included; 1: a dense layer."""
    earlier: int
    """Of them those of earlier expansions, frozen."""

    @property
    def newest(self) -> int:
        """Those of the latest expansion."""
        return self.count - 1 - self.earlier


def activation_bytes(
    shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, recompute: Recompute, stage: int
) -> float:
    """Activations of all micro-batches that a pipeline stage has in flight, and what the backward pass of one layer
    needs beyond the memory of the logits, which are gone by then."""
    working = working_bytes(shape, layout, sizes, recompute, stage) - logit_bytes(shape, layout, sizes, stage)
    return kept_bytes(shape, layout, sizes, recompute, stage) + max(working, 0.0)


def kept_bytes(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, recompute: Recompute, stage: int) -> float:
    """Activations of all micro-batches in flight when a backward pass begins, logits left out."""
    layers = _layers(shape, layout, sizes, stage)
    chunks = layout.num_virtual_stages_per_pipeline_rank
    of_layers = sum(_layer(shape, experts, layout, of_layer, recompute) for experts, of_layer in layers) / chunks
    a_chunk = of_layers + _beside_layers(shape, layout, sizes, stage) / chunks
    hidden = shape.architecture.hidden_size * sizes.element_bytes
    # A gradient on its way between two stages.
    travelling = hidden if layout.pipeline_model_parallel_size > 1 else 0
    per_token = a_chunk * chunks_in_flight(layout, sizes, stage) + travelling
    # The rotary embedding's angles, the same for all layers and micro-batches, whole on every rank.
    angles = FP32 * shape.architecture.head_dim * sizes.seq_length
    return per_token * _tokens(layout, sizes) + angles


def working_bytes(
    shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, recompute: Recompute, stage: int
) -> float:
    """Most that the backward pass of one layer needs beside what is kept: what it computes again, and gradients. That
    of the new experts comes after the original expert's, whose part of what was computed again is gone by then."""
    tokens = _tokens(layout, sizes)
    at_most = 0.0
    for experts, of_layer in _layers(shape, layout, sizes, stage):
        again = _again(shape, experts, layout, of_layer, recompute)
        gone = 0.0
        if recompute in ("moe", "full") and experts.count > 1:
            gone = _rows(shape, experts, layout, sizes)[0] * _original_expert(shape, of_layer)
        of_output = shape.architecture.hidden_size * sizes.element_bytes
        in_experts = (again - gone) * tokens + _gradients(shape, experts, layout, of_layer)
        at_most = max(at_most, (again + of_output) * tokens, in_experts)
    return at_most


def _layers(
    shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, stage: int
) -> list[tuple[LayerExperts, RunSizes]]:
    """Each layer of a stage, and the run's sizes with what trains in this layer."""
    return [
        (
            LayerExperts(shape.experts_per_layer[layer], shape.earlier_experts(layer)),
            dataclasses.replace(sizes, trains=trained_in_layer(sizes.trains, layer in shape.inserted_blocks)),
        )
        for layer in stage_layers(shape, layout, stage)
    ]


def chunks_in_flight(layout: ParallelLayout, sizes: RunSizes, stage: int) -> int:
    """Forward passes of a model chunk that wait for their backward pass in Megatron's schedules."""
    stages, chunks = layout.pipeline_model_parallel_size, layout.num_virtual_stages_per_pipeline_rank
    if chunks == 1:
        return min(stages - stage, sizes.num_microbatches(layout))
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, chunks * sizes.num_microbatches(layout))


def logit_bytes(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, stage: int) -> float:
    """Logits and their fp32 softmax, then the softmax and their gradient, on the last pipeline stage."""
    return (sizes.element_bytes + FP32) * _logits(shape, layout, sizes, stage)


def kept_logit_bytes(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, stage: int) -> float:
    """Of the logits what is still there when the backward pass begins: the softmax in fp32."""
    return FP32 * _logits(shape, layout, sizes, stage)


def _logits(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, stage: int) -> float:
    if stage != layout.pipeline_model_parallel_size - 1:
        return 0.0
    columns = padded_vocab_size(shape.architecture.vocab_size, layout.tensor_model_parallel_size)
    return _tokens(layout, sizes) * columns


def _tokens(layout: ParallelLayout, sizes: RunSizes) -> float:
    """Tokens of a micro-batch over the TP ranks: both a rank's piece under SP and its share of split features."""
    return sizes.micro_batch_size * sizes.seq_length / layout.tensor_model_parallel_size


def _beside_layers(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, stage: int) -> float:
    """Bytes a token leaves in a stage outside of its layers: the first layer's input, and the output matrix's where it
    trains. A stage that is not the last frees its last layer's output once it is sent, which makes up for its input."""
    if stage != layout.pipeline_model_parallel_size - 1:
        return 0.0
    hidden = shape.architecture.hidden_size * sizes.element_bytes
    return hidden + (hidden if "embedding" in sizes.trains else 0)


def _layer(
    shape: ModelShape, experts: LayerExperts, layout: ParallelLayout, sizes: RunSizes, recompute: Recompute
) -> float:
    """Bytes a token leaves in a layer between its forward and its backward pass: the layer's output, and the rest."""
    hidden = shape.architecture.hidden_size * sizes.element_bytes
    if recompute == "full":
        return hidden
    attention = _attention(shape, sizes, recompute)
    if experts.count == 1:
        return 2 * hidden + attention + (0 if recompute == "mlp" else _dense_ffn(shape, sizes))
    norm_output = 0 if recompute == "layernorm" else hidden
    mixture = 0 if recompute == "moe" else _mixture(shape, experts, layout, sizes, recompute)
    return 2 * hidden + attention + norm_output + mixture


def _again(
    shape: ModelShape, experts: LayerExperts, layout: ParallelLayout, sizes: RunSizes, recompute: Recompute
) -> float:
    """Bytes of a token that a layer's backward pass computes again before it begins."""
    if recompute == "full":
        return _layer(shape, experts, layout, sizes, "none")
    if experts.count == 1:
        return _dense_ffn(shape, sizes) if recompute == "mlp" else 0.0
    kept = _mixture(shape, experts, layout, sizes, "none")
    left = {"moe": 0.0, "moe_act": _mixture(shape, experts, layout, sizes, "moe_act")}
    return kept - left.get(recompute, kept)


def _gradients(shape: ModelShape, experts: LayerExperts, layout: ParallelLayout, sizes: RunSizes) -> float:
    """Bytes of a rank's gradients in the FFN's backward pass at its fullest moment, less what is freed by then.

    Weight gradients of all the rank's experts come in the weights' format and are then added to the fp32 buffer. After
    a second expansion the two groups of experts are taken as one product; those that are frozen have no such gradients.
    """
    hidden, element = shape.architecture.hidden_size, sizes.element_bytes
    rows, ranks, local = _tokens(layout, sizes), layout.tensor_model_parallel_size, 1
    trains = "dense FFN" in sizes.trains
    if experts.count > 1:
        rows *= _rows(shape, experts, layout, sizes)[1]
        trained = experts.count - 1 if "earlier experts" in sizes.trains else experts.newest
        ranks, local = layout.expert_tensor_parallel_size, trained // layout.expert_model_parallel_size
        trains = "new experts" in sizes.trains and trained > 0
    # The copies that the products take: by rows, and for the weight's gradient by columns.
    in_fp8 = (2 if trains else 1) if sizes.precision == "fp8" else 0
    tokens, inner = rows * hidden * ranks, rows * shape.architecture.ffn_hidden_size
    matrix = local * hidden * shape.architecture.ffn_hidden_size / ranks * element if trains else 0.0
    freed = inner * _trained_share(experts, sizes) * _input_bytes(sizes) if trains else 0.0
    second_product = tokens * (element + in_fp8) + inner * element + matrix
    activation = 3 * inner * element - freed
    first_product = 2 * inner * in_fp8 + tokens * element + 2 * matrix - freed
    return max(second_product, activation, first_product) + _tokens(layout, sizes) * hidden * element


def _attention(shape: ModelShape, sizes: RunSizes, recompute: Recompute) -> float:
    """The input of the QKV matrix where it trains, queries and keys before their norm, and what fused attention keeps;
    without it (fp32) the softmax."""
    architecture, element = shape.architecture, sizes.element_bytes
    query = architecture.num_attention_heads * architecture.head_dim
    key = value = architecture.num_query_groups * architecture.head_dim
    trains = "attention" in sizes.trains
    before = architecture.hidden_size * _input_bytes(sizes) if trains else 0
    if architecture.family.qk_norm:
        before += element * (query + key)
    if sizes.precision == "fp32":
        softmax = architecture.num_attention_heads * sizes.seq_length
        return before + element * (3 * query + softmax) + sizes.seq_length
    statistics = FP32 * architecture.num_attention_heads
    output = query
    output_in_fp8 = query if trains and sizes.precision == "fp8" and sizes.fp8_recipe == "delayed" else 0
    if recompute == "core_attn":
        # The values are a view of the whole QKV product, which so stays as well.
        return before + element * (2 * (query + key) + value + (output if trains else 0)) + output_in_fp8
    return before + element * (query + key + value + output) + statistics + output_in_fp8


def _dense_ffn(shape: ModelShape, sizes: RunSizes) -> float:
    """Both halves of the first product, and where the matrices train their inputs."""
    hidden, ffn = shape.architecture.hidden_size, shape.architecture.ffn_hidden_size
    inputs = (hidden + ffn) * _input_bytes(sizes) if "dense FFN" in sizes.trains else 0
    return 2 * ffn * sizes.element_bytes + inputs


def _mixture(
    shape: ModelShape, experts: LayerExperts, layout: ParallelLayout, sizes: RunSizes, recompute: Recompute
) -> float:
    """Routing, and what the experts of a token keep."""
    original, new = _rows(shape, experts, layout, sizes)
    share = _trained_share(experts, sizes)
    return (
        _routing(experts.count, original, new)
        + original * _original_expert(shape, sizes)
        + new * _new_expert(shape, layout, sizes, recompute, share)
    )


def _rows(shape: ModelShape, experts: LayerExperts, layout: ParallelLayout, sizes: RunSizes) -> tuple[float, float]:
    """Rows of the original expert and of the new experts on a rank, for each token of the rank."""
    if sizes.routing == "balanced":
        original = shape.top_k / experts.count
        return original, shape.top_k - original
    ranks = layout.expert_model_parallel_size
    return 0.0, ranks * min(shape.top_k, (experts.count - 1) // ranks)


def _trained_share(experts: LayerExperts, sizes: RunSizes) -> float:
    """Of the rows of new experts those of experts that train; at worst all, where there are such experts."""
    at_worst = sizes.routing == "worst" and experts.newest > 0
    if experts.count == 1 or "earlier experts" in sizes.trains or at_worst:
        return 1.0
    return experts.newest / (experts.count - 1)


def _routing(experts: int, original: float, new: float) -> float:
    """Maps and weights of the router and the dispatcher: logits, probabilities, choices, the row of each copy."""
    router = 2 * FP32 * experts + experts
    return router + _dispatcher(experts) + 2 * FP32 * new + 8 * original


def _dispatcher(experts: int) -> float:
    """What a layer's dispatcher holds until the next micro-batch, recomputed or not: the row of each copy, weights and
    choices of the new experts."""
    new = experts - 1
    return FP32 * (2 * new + 1) + (FP32 + 1) * new if new else 0.0


def _original_expert(shape: ModelShape, sizes: RunSizes) -> float:
    """Both halves of the first product, the output and the weighted output, and inputs where it trains."""
    hidden, ffn = shape.architecture.hidden_size, shape.architecture.ffn_hidden_size
    inputs = (hidden + ffn) * _input_bytes(sizes) if "original expert" in sizes.trains else 0
    return (2 * ffn + 2 * hidden) * sizes.element_bytes + inputs


def _new_expert(
    shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, recompute: Recompute, share: float
) -> float:
    """Both halves of the first product; of the `share` whose experts train, the tokens, whole on each expert TP rank,
    and the second product's input."""
    hidden, ffn = shape.architecture.hidden_size, shape.architecture.ffn_hidden_size
    product = 2 * ffn * sizes.element_bytes
    if "new experts" not in sizes.trains:
        return product
    activation = 0 if recompute == "moe_act" else ffn
    return product + share * (hidden * layout.expert_tensor_parallel_size + activation) * _input_bytes(sizes)


def _input_bytes(sizes: RunSizes) -> float:
    """Of a number in a matrix's input, kept for the weight's gradient."""
    if sizes.precision != "fp8":
        return sizes.element_bytes
    return 1 + FP32 / BLOCK if sizes.fp8_recipe == "blockwise" else 1
