"""How many parameters a model has, by kind, and how many of them a token passes."""

from collections import Counter
from collections.abc import Iterable

from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.configuration.parameters import Parameter

ParameterCounts = Counter[ParameterKind]


def count_parameters(parameters: Iterable[Parameter]) -> ParameterCounts:
    """Number of parameters of each kind, without the rows that pad a vocabulary."""
    counts: ParameterCounts = Counter()
    for parameter in parameters:
        counts[parameter.kind] += parameter.size
    return counts


def active_parameters(counts: ParameterCounts, top_k: int, base_experts: int = 1) -> int:
    """Number of parameters that one token passes: of each layer's experts, which are equally large, `top_k`.

    Args:
        base_experts: original experts of each layer that has experts, more than 1 of a mixture base.
    """
    outside_experts = sum(count for kind, count in counts.items() if not kind.is_expert)
    original = counts[ParameterKind.ORIGINAL_EXPERT] + counts[ParameterKind.BASE_EXPERTS]
    return outside_experts + top_k * (original // base_experts)
