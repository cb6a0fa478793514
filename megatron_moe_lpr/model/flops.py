"""Floating-point operations of one training step, counting only what is computed."""

from collections.abc import Collection

from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.parameter_kinds import ParameterKind, trained_in_layer


def training_flops_per_token(shape: ModelShape, trains: Collection[ParameterKind], sequence_length: int) -> float:
    """Operations per token, a multiply-add counted as two; recomputation is not counted.

    Each matrix costs its size forward and again for the gradient of its input; the gradient of its weights only where
    it trains. The token's experts are counted top_k times; which of them is the original one is not known beforehand,
    so the expected share under uniform routing is used. Causal attention scores see half the sequence.
    """
    architecture = shape.architecture
    head = architecture.hidden_size * architecture.vocab_size
    total = _matrix(head, "embedding" in trains)
    for layer, experts in enumerate(shape.experts_per_layer):
        of_layer = trained_in_layer(trains, layer in shape.inserted_blocks)
        total += _matrix(_attention_weights(shape), "attention" in of_layer)
        total += _ffn(shape, experts, shape.earlier_experts(layer), of_layer)
        total += 3 * 2 * architecture.num_attention_heads * architecture.head_dim * sequence_length
    return float(total)


def _matrix(weights: float, trains: bool) -> float:
    return 2 * weights * (3 if trains else 2)


def _attention_weights(shape: ModelShape) -> int:
    architecture = shape.architecture
    query = architecture.num_attention_heads * architecture.head_dim
    key_value = architecture.num_query_groups * architecture.head_dim
    return architecture.hidden_size * (2 * query + 2 * key_value)


def _ffn(shape: ModelShape, experts: int, earlier: int, trains: Collection[ParameterKind]) -> float:
    architecture = shape.architecture
    ffn = 3 * architecture.hidden_size * architecture.ffn_hidden_size
    if experts == 1:
        return _matrix(ffn, "dense FFN" in trains)
    original, frozen = shape.top_k / experts, shape.top_k * earlier / experts
    return (
        _matrix(architecture.hidden_size * experts, "router" in trains)
        + original * _matrix(ffn, "original expert" in trains)
        + frozen * _matrix(ffn, "earlier experts" in trains)
        + (shape.top_k - original - frozen) * _matrix(ffn, "new experts" in trains)
    )
