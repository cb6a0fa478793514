"""Activations of one rank: what the backward passes will need, from the shapes alone.

The bytes are those that Transformer Engine's layers keep, checked case by case against the tensors that a step really
holds on its emulation (docs/planning.md). A frozen matrix does not keep its input, since it has no weight gradient.
Left out: the rows by which each expert's tokens are padded for FP8, at most 15 an expert (with blockwise under TP 127).
"""

from megatron_moe_lpr.model.build import vocabulary_layout
from megatron_moe_lpr.planning.layer_activations import (
    gradient_bytes,
    kept_bytes_per_token,
    original_expert_bytes,
    recomputed_bytes_per_token,
    rows_per_token,
)
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.sizes import FP32


def activation_bytes(run: PlannedRun, pipeline_rank: int) -> float:
    """Activations kept for the backward passes, and what the backward pass of one layer needs beyond the memory of the
    logits, which are freed before it."""
    working = working_bytes(run, pipeline_rank) - logit_bytes(run, pipeline_rank)
    return kept_bytes(run, pipeline_rank) + max(working, 0.0)


def kept_bytes(run: PlannedRun, pipeline_rank: int) -> float:
    """Activations of all micro-batches in flight when a backward pass begins, without logits."""
    chunks = run.layout.num_virtual_stages_per_pipeline_rank
    layers = sum(kept_bytes_per_token(layer, run.recompute) for layer in run.layers(pipeline_rank))
    chunk = layers / chunks + _outside_layers(run, pipeline_rank) / chunks
    # The gradient that a pipeline rank receives from the next one.
    received = run.hidden_bytes if run.layout.pipeline_model_parallel_size > 1 else 0
    per_token = chunk * chunks_in_flight(run, pipeline_rank) + received
    # Angles of the rotary embedding [S, d]: the same for all layers and micro-batches, whole on every rank; those of a
    # CP rank's tokens are copied for each micro-batch.
    copied = run.own_length if run.layout.context_parallel_size > 1 else 0
    angles = FP32 * run.shape.architecture.head_dim * (run.sizes.seq_length + copied)
    return per_token * run.rank_tokens + angles


def working_bytes(run: PlannedRun, pipeline_rank: int) -> float:
    """Most that the backward pass of one layer needs beside what is kept: recomputed activations, and gradients."""
    most = 0.0
    for layer in run.layers(pipeline_rank):
        recomputed = recomputed_bytes_per_token(layer)
        # The new experts' backward pass comes after the original expert's, whose recomputed part is freed by then.
        freed = 0.0
        if (run.recompute in ("moe", "full") or not run.sizes.transformer_engine) and layer.is_moe:
            freed = rows_per_token(layer)[0] * original_expert_bytes(layer)
        at_output = (recomputed + run.hidden_bytes) * run.rank_tokens
        in_experts = (recomputed - freed) * run.rank_tokens + gradient_bytes(layer)
        most = max(most, at_output, in_experts)
    return most


def chunks_in_flight(run: PlannedRun, pipeline_rank: int) -> int:
    """Forward passes of a model chunk that wait for their backward pass in Megatron's schedules
    (pipeline_parallel/schedules.py: 1F1B, and interleaved with several chunks a rank)."""
    ranks, chunks = run.layout.pipeline_model_parallel_size, run.layout.num_virtual_stages_per_pipeline_rank
    if chunks == 1:
        return min(ranks - pipeline_rank, run.num_microbatches)
    return min(2 * (ranks - pipeline_rank - 1) + (chunks - 1) * ranks + 1, chunks * run.num_microbatches)


def logit_bytes(run: PlannedRun, pipeline_rank: int) -> float:
    """Logits and their fp32 softmax, then the softmax and their gradient, on the last pipeline rank."""
    if not run.is_last(pipeline_rank):
        return 0.0
    columns = sum(vocabulary_layout(run.shape, run.layout.tensor_model_parallel_size).padded)
    return (run.sizes.element_bytes + FP32) * (run.rank_tokens * columns)


def _outside_layers(run: PlannedRun, pipeline_rank: int) -> float:
    """Bytes that a token keeps outside of the layers: input of the first layer, and of the output matrix if it trains.

    A pipeline rank that is not the last frees its last layer's output once it is sent, which makes up for its input.
    """
    if not run.is_last(pipeline_rank):
        return 0.0
    return run.hidden_bytes + (run.hidden_bytes if run.trained_vocabulary else 0)
