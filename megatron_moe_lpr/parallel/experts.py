"""The check that EP ranks can share a layer's experts."""

import math
from collections.abc import Sequence

from megatron_moe_lpr.errors import UserError


def check_expert_parallel(num_new_experts: int, expert_parallel_size: int) -> None:
    """Check that EP ranks can share a layer's new experts evenly.

    Every EP rank holds the original expert, so only the new ones count.

    Raises:
        UserError: naming the expert-parallel sizes and the numbers of experts that would fit.
    """
    if num_new_experts % expert_parallel_size == 0:
        return
    sizes = ", ".join(str(size) for size in range(1, num_new_experts + 1) if num_new_experts % size == 0)
    counts = ", ".join(str(expert_parallel_size * multiple + 1) for multiple in range(1, 4))
    raise UserError(
        f"--expert-model-parallel-size {expert_parallel_size} does not divide {num_new_experts} new experts "
        f"({num_new_experts + 1} experts less the original one); it can be one of {sizes}, "
        f"or convert with --num-experts {counts}, ..."
    )


def check_mixture_parallel(base: int, added: Sequence[int], expert_parallel_size: int) -> None:
    """Check that EP ranks can share a layer's experts evenly, those of a mixture base and each expansion's apart.

    Args:
        base: original experts of the layer.
        added: new experts of each expansion; 0: it added none to this layer.

    Raises:
        UserError: naming the expert-parallel sizes that would fit.
    """
    counts = [base, *filter(None, added)]
    largest = math.gcd(*counts)
    if largest % expert_parallel_size == 0:
        return
    sizes = ", ".join(str(size) for size in range(1, largest + 1) if largest % size == 0)
    new = " and ".join(map(str, counts[1:]))
    raise UserError(
        f"--expert-model-parallel-size {expert_parallel_size} must divide the {base} experts of the base model and "
        f"the {new} new ones of a layer, which are spread apart; it can be one of {sizes}"
    )
