"""Bytes that a rank sends in one training step, from the shapes alone, by kind of parallelism.

Checked against every call of real ranks (tests/planning/test_communication.py) and of the emulated device
(tests/gpu/test_communication.py). Left out: scalars (losses, norms, flags, FP8's largest values; some hundred bytes a
step) and the rows by which the original expert's tokens are padded for FP8. The dispatcher is the all-to-all one.
"""

import dataclasses

from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.planning.gradient_traffic import gradient_traffic
from megatron_moe_lpr.planning.moe_traffic import moe_layer_traffic
from megatron_moe_lpr.planning.planned_run import PlannedLayer, PlannedRun
from megatron_moe_lpr.planning.routing import Routing
from megatron_moe_lpr.planning.sizes import FP32
from megatron_moe_lpr.planning.traffic import (
    GPU,
    LOCAL_GPU,
    Passes,
    PlatformBehaviour,
    Traffic,
    tensor_pair,
    tensor_unit,
)


def rank_traffic(
    run: PlannedRun,
    routing: Routing,
    pipeline_rank: int = 0,
    expert_rank: int = 0,
    original_in_ep_group: bool = False,
    behaviour: PlatformBehaviour = GPU,
) -> Traffic:
    """Bytes that one rank sends in a step.

    Args:
        routing: how often tokens choose each expert, the same on every rank.
        original_in_ep_group: the original expert, frozen, is one of the experts of EP rank 0 and its tokens are
            dispatched like the others', as in a stock MoE layer; False: every rank has it, as in this project.
    """
    micro_batch = _outside_layers(run, pipeline_rank)
    for layer in run.layers(pipeline_rank):
        passes = _passes(layer, behaviour)
        micro_batch += _pair_traffic(layer, passes.attention, passes.backward, ParameterKind.ATTENTION in layer.trains)
        micro_batch += _qk_norm_traffic(layer, passes)
        micro_batch += _context_traffic(layer, passes, behaviour)
        if layer.is_moe:
            micro_batch += moe_layer_traffic(layer, passes, routing, expert_rank, original_in_ep_group)
        else:
            micro_batch += _pair_traffic(layer, passes.ffn, passes.backward, ParameterKind.DENSE_FFN in layer.trains)
    step = Traffic(*(run.num_microbatches * part for part in dataclasses.astuple(micro_batch)))
    return step + gradient_traffic(run, pipeline_rank, behaviour)


def busiest_rank(run: PlannedRun, routing: Routing, original_in_ep_group: bool = False) -> Traffic:
    """Bytes of the pipeline rank that sends most, on GPUs; in each layer of the EP rank that sends most there, since
    all others wait for it."""
    most, behaviour = Traffic(), GPU if run.sizes.transformer_engine else LOCAL_GPU
    for pipeline_rank in run.pipeline_ranks:
        traffic = rank_traffic(run, routing, pipeline_rank, 0, original_in_ep_group, behaviour)
        expert = expert_tensor = 0.0
        for layer in (layer for layer in run.layers(pipeline_rank) if layer.is_moe):
            passes, ranks = _passes(layer, behaviour), range(run.layout.expert_model_parallel_size)
            each = [moe_layer_traffic(layer, passes, routing, rank, original_in_ep_group) for rank in ranks]
            expert += max(one.expert for one in each)
            expert_tensor += max(one.expert_tensor for one in each)
        batches = run.num_microbatches
        traffic = dataclasses.replace(traffic, expert=expert * batches, expert_tensor=expert_tensor * batches)
        most = max(most, traffic, key=lambda one: one.total)
    return most


def _passes(layer: PlannedLayer, behaviour: PlatformBehaviour) -> Passes:
    run = layer.run
    ffn_recomputed = run.recompute == "full" or run.recompute == ("moe" if layer.is_moe else "mlp")
    return Passes(
        attention=2 if run.recompute == "full" else 1,
        ffn=2 if ffn_recomputed else 1,
        backward=behaviour.gradient_of_embedding or layer.has_trained_weight_below,
    )


def _pair_traffic(layer: PlannedLayer, forward: int, backward: bool, trains: bool) -> Traffic:
    """Attention or a dense FFN: a matrix split by columns and one split by rows after it."""
    pair = tensor_pair(layer.run, forward, backward, trains)
    return Traffic(tensor=tensor_unit(layer.run, layer.architecture.hidden_size * pair))


def _qk_norm_traffic(layer: PlannedLayer, passes: Passes) -> Traffic:
    """All-reduces of a token's sums of squares, of queries and of keys, where all heads are normalised together."""
    if layer.architecture.family.qk_norm != "all heads":
        return Traffic()
    reductions = 2 * (passes.attention + passes.backward)
    return Traffic(tensor=reductions * 2 * tensor_unit(layer.run, FP32))


def _context_traffic(layer: PlannedLayer, passes: Passes, behaviour: PlatformBehaviour) -> Traffic:
    """Keys and values of a micro-batch, and their gradients, over the CP ranks.

    Local layers gather keys and values, and scatter the sums of their gradients. Transformer Engine does so too where
    there is a sliding window, else it sends both around a ring, and in either case keys and values once more in the
    backward pass (context_parallel.py `AttnFuncWithCPAndKVP2P`, `AttnFuncWithCPAndKVAllGather`).
    """
    run, architecture = layer.run, layer.architecture
    values = 2 * architecture.num_query_groups * architecture.head_dim / run.layout.tensor_model_parallel_size
    own = run.sizes.micro_batch_size * run.own_length * values * run.sizes.element_bytes
    others = run.layout.context_parallel_size - 1
    forward = others * (2 if run.recompute in ("full", "core_attn") else 1)
    backward = others if behaviour.local_attention else 2 * others
    return Traffic(context=own * (forward + backward * passes.backward))


def _outside_layers(run: PlannedRun, pipeline_rank: int) -> Traffic:
    """Embedding, output matrix and loss over the TP ranks; what a micro-batch sends to the next and previous ranks of
    the pipeline."""
    ranks, chunks = run.layout.pipeline_model_parallel_size, run.layout.num_virtual_stages_per_pipeline_rank
    sequence_parallel, trains = run.layout.uses_sequence_parallel, bool(run.trained_vocabulary)
    first, last = pipeline_rank == 0, run.is_last(pipeline_rank)
    units = 0
    tensor = 0.0
    if first:
        # Of the embedding's output an all-reduce; under SP a reduce-scatter, and a gather for the gradient.
        units += 2 if not sequence_parallel else 1 + int(trains)
    if last:
        units += 2 + int(trains and sequence_parallel)
        # The cross entropy's all-reduces in fp32: largest logit, the target's logit, the sum of exponentials.
        tensor = 3 * 2 * tensor_unit(run, FP32)
    tensor += units * tensor_unit(run, run.hidden_bytes)
    if ranks == 1:
        return Traffic(tensor=tensor)
    tokens = run.sizes.micro_batch_size * run.own_length
    if sequence_parallel:
        tokens //= run.layout.tensor_model_parallel_size
    messages = 2 * chunks - int(first) - int(last)
    return Traffic(tensor=tensor, pipeline=messages * tokens * run.hidden_bytes)
