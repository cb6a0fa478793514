"""Activations of one rank: what the backward pass will need, from the shapes alone.

Counted is what autograd keeps with fused attention. A frozen matrix does not keep its input, since it has no weight
gradient. Routing is taken as uniform.
"""

from typing import TYPE_CHECKING, Literal

from megatron_moe_lpr.model.config import ModelShape
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.parameters import stage_layers

if TYPE_CHECKING:
    from megatron_moe_lpr.planning.memory import RunSizes

Recompute = Literal["none", "moe", "full"]
"""none: keep all; moe: compute the MoE layer again (`--recompute-granularity selective --recompute-modules moe`);
full: whole layers."""


def activation_bytes(
    shape: ModelShape, layout: ParallelLayout, sizes: "RunSizes", recompute: Recompute, stage: int
) -> float:
    """Activations of all micro-batches that a pipeline stage has in flight, and what recomputing one layer adds."""
    layers = [shape.experts_per_layer[layer] for layer in stage_layers(shape, layout, stage)]
    kept = (
        sum(_kept(shape, experts, sizes, recompute) for experts in layers) / layout.num_virtual_stages_per_pipeline_rank
    )
    everything = max(_attention(shape, sizes) + _ffn(shape, experts, sizes) for experts in layers)
    working = 0.0 if recompute == "none" else everything
    embedding = shape.architecture.hidden_size
    elements = kept * chunks_in_flight(layout, sizes, stage) + working + embedding
    return elements * _tokens(layout, sizes) * sizes.element_bytes


def chunks_in_flight(layout: ParallelLayout, sizes: "RunSizes", stage: int) -> int:
    """Forward passes of a model chunk that wait for their backward pass in Megatron's schedules."""
    stages, chunks = layout.pipeline_model_parallel_size, layout.num_virtual_stages_per_pipeline_rank
    if chunks == 1:
        return min(stages - stage, sizes.num_microbatches(layout))
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, chunks * sizes.num_microbatches(layout))


def logit_bytes(shape: ModelShape, layout: ParallelLayout, sizes: "RunSizes", stage: int) -> float:
    """Logits, their fp32 softmax and their gradient, on the last pipeline stage."""
    if stage != layout.pipeline_model_parallel_size - 1:
        return 0.0
    tokens = sizes.micro_batch_size * sizes.seq_length
    return tokens * shape.architecture.vocab_size / layout.tensor_model_parallel_size * (2 * sizes.element_bytes + 4)


def _tokens(layout: ParallelLayout, sizes: "RunSizes") -> float:
    """Tokens of a micro-batch over the TP ranks: both a rank's piece under SP and its share of split features."""
    return sizes.micro_batch_size * sizes.seq_length / layout.tensor_model_parallel_size


def _kept(shape: ModelShape, experts: int, sizes: "RunSizes", recompute: Recompute) -> float:
    """Elements a token leaves in a layer between its forward and its backward pass."""
    hidden = shape.architecture.hidden_size
    if recompute == "full":
        return hidden
    ffn = hidden if recompute == "moe" and experts > 1 else _ffn(shape, experts, sizes)
    return _attention(shape, sizes) + ffn


def _attention(shape: ModelShape, sizes: "RunSizes") -> float:
    """The norms' two inputs, query, key, value and the output."""
    architecture = shape.architecture
    heads = 2 * architecture.num_attention_heads + 2 * architecture.num_query_groups
    norm_output = architecture.hidden_size if "attention" in sizes.trains else 0
    return 2 * architecture.hidden_size + heads * architecture.head_dim + norm_output


def _ffn(shape: ModelShape, experts: int, sizes: "RunSizes") -> float:
    """The FFN's input and what its matrices keep; in a MoE layer for each of the token's experts."""
    hidden, ffn = shape.architecture.hidden_size, shape.architecture.ffn_hidden_size
    if experts == 1:
        return hidden + 2 * ffn + (ffn if "dense FFN" in sizes.trains else 0)
    original = shape.top_k / experts
    input_and_activation = hidden + ffn
    of_original = 2 * ffn + hidden + (input_and_activation if "original expert" in sizes.trains else 0)
    of_new = 2 * ffn + (input_and_activation if "new experts" in sizes.trains else 0)
    return hidden + original * of_original + (shape.top_k - original) * of_new
