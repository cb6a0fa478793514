"""Floating-point operations of one training step, counting only what is computed."""

from collections import Counter
from collections.abc import Collection

from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.configuration.parameters import Parameter


def training_flops_per_token(shape: ModelShape, trains: Collection[ParameterKind], sequence_length: int) -> float:
    """Operations per token, a multiply-add counted as two; recomputation is not counted.

    Each matrix costs its size forward and again for the gradient of its input; the gradient of its weights only where
    it trains. The token's experts are counted top_k times; which of them is the original one is not known beforehand,
    so the expected share under uniform routing is used. Causal attention scores see half the sequence.
    """
    # Numerators by denominator, so that shares of experts add up without rounding.
    operations: Counter[int] = Counter()
    for parameter in shape.parameters:
        if parameter.is_product:
            passes = 3 if parameter.kind in trains else 2
            choices, experts = _choices(parameter, shape)
            operations[experts] += 2 * passes * parameter.size * choices
    # Queries by keys and scores by values: half of the sequence each, forward once and backward twice.
    architecture = shape.architecture
    query = architecture.num_attention_heads * architecture.head_dim
    operations[1] += architecture.num_layers * 3 * 2 * query * sequence_length
    return float(sum(count / experts for experts, count in operations.items()))


def _choices(parameter: Parameter, shape: ModelShape) -> tuple[int, int]:
    """A token passes so many of so many experts; what is no expert it passes once."""
    if parameter.layer is None or not parameter.kind.is_expert:
        return 1, 1
    return shape.top_k, shape.experts_per_layer[parameter.layer]
