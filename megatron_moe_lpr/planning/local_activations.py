"""Activations of layers of PyTorch alone (`--transformer-impl local`), where they differ from Transformer Engine's.

As in `layer_activations.py`, bytes that a token keeps between forward and backward pass, checked against the tensors
that a step really holds (tests/gpu/test_local_memory.py).
"""

from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.planning.planned_run import PlannedLayer, Recompute
from megatron_moe_lpr.planning.sizes import FP32

INT64 = 8
ANGLES = 4
"""Cosines and sines, of queries and of keys: each call of Megatron's rotary embedding makes its own
(rope_utils.py `_apply_rotary_pos_emb_bshd`)."""


def local_attention_bytes(layer: PlannedLayer, recompute: Recompute) -> float:
    """What PyTorch's attention keeps: queries, keys and values, these two repeated for each head, its output and a
    number for each head. Without repetition the values are a view of the whole QKV product, and so are the keys before
    their norm, so that this stays. Angles and the mask of a sliding window are those of positions, the same for all
    samples and whole on each TP rank."""
    architecture, run = layer.architecture, layer.run
    element, heads, groups = run.sizes.element_bytes, architecture.num_attention_heads, architecture.num_query_groups
    query, product = heads * architecture.head_dim, (heads + 2 * groups) * architecture.head_dim
    repeats, normed = heads > groups, architecture.family.qk_norm == "heads"
    # The queries of one group lie beside each other, and are a view of the product; those of several are copied.
    copies = repeats and groups > run.layout.tensor_model_parallel_size
    trains = ParameterKind.ATTENTION in layer.trains
    values = architecture.hidden_size if trains else 0  # input of the QKV matrix
    values += query if normed and copies else 0  # queries before their norm
    numbers = heads + (heads + groups if normed else 0)
    if architecture.family.qk_norm == "all heads":
        numbers += (product - groups * architecture.head_dim) * (2 if ParameterKind.NORM in layer.trains else 1)
    if recompute == "core_attn":
        values += query + groups * architecture.head_dim + product + (query if trains else 0)
        return element * values + FP32 * (numbers - heads) + _position_bytes(layer, mask=False)
    # Keys and values are those of whole sequences under context parallelism, and no view of the product.
    CP = run.layout.context_parallel_size
    values += (2 + 2 * CP) * query if repeats or CP > 1 else 3 * query
    values += product if normed or not (repeats or CP > 1) else 0
    return element * values + FP32 * numbers + _position_bytes(layer, mask=True)


def _position_bytes(layer: PlannedLayer, mask: bool) -> float:
    """Bytes of a token's share of the angles and of the mask."""
    run, architecture = layer.run, layer.architecture
    angles = 0 if layer.index in architecture.full_attention_layers else ANGLES * architecture.head_dim
    window, keys, CP = architecture.window(layer.index), run.sizes.seq_length, run.layout.context_parallel_size
    masked: float = keys if mask and window is not None and window < keys else 0
    if mask and CP > 1:
        # A mask for each of a CP rank's two chunks, of the keys up to the chunk's end: half of them on average.
        masked = keys * (2 * CP + 1) / (4 * CP)
    repeated = run.layout.tensor_model_parallel_size / run.sizes.micro_batch_size
    return run.sizes.element_bytes * (angles + masked) * repeated


def local_routing_bytes(layer: PlannedLayer, original: float, new: float) -> float:
    """Router and dispatcher: logits, weights and choices of all experts; of a token's copies the expert, the softmax,
    the order and the weight; again the weights of those that were sent."""
    E, K, layout = layer.num_experts, layer.run.shape.top_k, layer.run.layout
    exchanges = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size > 1
    router = 2 * FP32 * E + E + (INT64 + FP32) * K
    return router + (INT64 + FP32) * (original + new) + (FP32 * new if exchanges else 0)


def local_gradient_bytes(layer: PlannedLayer, rows: float, ranks: int, trained: int) -> float:
    """Bytes of a rank's gradients at the fullest moment of the FFN's backward pass, less what is freed by then.

    Gradients of weights are tensors before they are added to the buffer: of one matrix, or in one launch of all of a
    rank's experts, and autograd is given a tensor for each (`model/moe/grouped_product.py`).

    Args:
        rows: of the new experts on this rank, or tokens of a dense FFN.
        ranks: over which the matrices are split.
        trained: matrices of each kind that train on this rank.
    """
    D, F, element = layer.architecture.hidden_size, layer.architecture.ffn_hidden_size, layer.run.sizes.element_bytes
    in_one_launch = layer.is_moe and element < FP32
    matrices = trained * (2 if in_one_launch else 1) + (1 if layer.is_moe and trained and not in_one_launch else 0)
    weights = matrices * D * F * element / ranks
    outer, inner = rows * D * (ranks if layer.is_moe else 1) * element, rows * F * element
    freed = inner if trained else 0.0
    # The router's gradient is added up in fp32, of the product and, in bf16, of a copy of a factor.
    for_router = rows * F * FP32 * (2 if element < FP32 else 1) if layer.is_moe else 0.0
    return max(outer + inner + weights, 4 * inner + for_router - freed, outer + 2 * weights - freed)
