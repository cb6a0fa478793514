"""Numbers of experts from the similarity of languages in each layer (LayerMoE, arXiv 2505.22582, section 3.2)."""

import dataclasses
import math
from collections.abc import Sequence

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_ranges import NonNegativeInt, PositiveInt

NEW_EXPERTS_A_LAYER = 2
"""Average where no budget is given: the published allocations have 56 new experts in 28 layers and 48 in 24."""
BISECTION_STEPS = 100


@dataclasses.dataclass(frozen=True)
class AllocationOptions:
    """How many experts an allocation may give, and where: flags of `moe-lpr allocate`."""

    budget: PositiveInt | None = None
    """Most new experts in all layers together. Default: 2 for each layer, as in the published allocations."""
    multiple_of: PositiveInt = 1
    """New experts of a layer come in multiples of this: the --expert-model-parallel-size of the run."""
    uniform_count: PositiveInt | None = None
    """Give each layer this many experts, the original one included, or none. Needed for an export."""
    dense_layers: tuple[NonNegativeInt, ...] = ()
    """Numbers of layers that get no experts, for example those marked poor."""


def published_allocation(similarity: Sequence[float], total: float) -> list[int]:
    """Experts of each layer, the original one included: ceil(B * (1/S_i) / sum_j 1/S_j) (the paper's equation 4).

    Args:
        similarity: S_i of each layer, above 0.
        total: B; the sum of the result is larger, because each layer is rounded up.
    """
    inverse = [1.0 / value for value in similarity]
    return [math.ceil(total * value / sum(inverse)) for value in inverse]


def allocate(similarity: Sequence[float], options: AllocationOptions) -> list[int]:
    """Experts of each layer, the original one included; 1: the layer stays dense.

    Without `uniform_count`: the published allocation with the largest B that keeps within the budget, in units of
    `multiple_of` new experts. With `uniform_count`: the layers in which languages are least similar get experts.

    Raises:
        UserError: options that contradict each other or the model, or a similarity that is not above 0.
    """
    _check(similarity, options)
    layers = [layer for layer in range(len(similarity)) if layer not in options.dense_layers]
    budget = NEW_EXPERTS_A_LAYER * len(similarity) if options.budget is None else options.budget
    experts = [1] * len(similarity)
    if options.uniform_count is not None:
        new = options.uniform_count - 1
        for layer in sorted(layers, key=lambda layer: similarity[layer])[: budget // new]:
            experts[layer] += new
    else:
        units = _units([similarity[layer] for layer in layers], budget // options.multiple_of)
        for layer, count in zip(layers, units, strict=True):
            experts[layer] += count * options.multiple_of
    if max(experts) == 1:
        raise UserError(f"--budget {budget}: too few for a single layer; raise it")
    return experts


def _units(similarity: Sequence[float], budget: int) -> list[int]:
    """New experts of each layer by the published formula, with the largest B that keeps within the budget, found by
    bisection, since their number grows with B."""
    low, high = 0.0, float(budget + len(similarity) + 1)
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        fits = sum(published_allocation(similarity, middle)) - len(similarity) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return [max(count, 1) - 1 for count in published_allocation(similarity, low)]


def _check(similarity: Sequence[float], options: AllocationOptions) -> None:
    for layer, value in enumerate(similarity):
        if not value > 0:
            raise UserError(f"layer {layer}: the languages' similarity is {value:.4f}, and 1/S needs it above 0")
    if options.multiple_of < 1:
        raise UserError(f"--multiple-of {options.multiple_of}: must be at least 1")
    if options.budget is not None and options.budget < 1:
        raise UserError(f"--budget {options.budget}: must be at least 1")
    if any(not 0 <= layer < len(similarity) for layer in options.dense_layers):
        raise UserError(f"--dense-layers: the layers are 0 to {len(similarity) - 1}")
    if len(set(options.dense_layers)) == len(similarity):
        raise UserError("--dense-layers: names every layer; leave one for experts")
    if options.uniform_count is None:
        return
    if options.uniform_count < 2:
        raise UserError(f"--uniform-count {options.uniform_count}: at least 2, the original expert and a new one")
    if (options.uniform_count - 1) % options.multiple_of:
        raise UserError(
            f"--uniform-count {options.uniform_count}: its {options.uniform_count - 1} new experts are not a multiple "
            f"of --multiple-of {options.multiple_of}"
        )
