"""--deterministic-mode: sums on GPUs in the same order in every run, as Megatron's flag of that name has them.

Megatron's own training program checks the variables (training/arguments.py); a library that calls Megatron-Core has to
set them itself.
"""

from collections.abc import MutableMapping

import torch

from megatron_moe_lpr.errors import UserError

VARIABLES: dict[str, tuple[str, ...]] = {
    # Transformer Engine: attention's backward pass without atomic additions.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    # NCCL: one algorithm for all reductions, instead of one chosen by measurement; the choices that Megatron allows.
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    # cuBLAS: workspaces that no two streams share.
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
}
"""Values that keep the order of sums; the first is set where the variable is not set."""


def fix_order_of_sums(environment: MutableMapping[str, str]) -> None:
    """Set the variables, and let torch use deterministic algorithms and raise where an operation has none.

    Call it before the process groups are made and before the first product.

    Raises:
        UserError: a variable is set to another value.
    """
    for name, values in VARIABLES.items():
        if environment.setdefault(name, values[0]) not in values:
            raise UserError(
                f"{name}={environment[name]}: --deterministic-mode needs {' or '.join(values)}; unset the variable"
            )
    torch.use_deterministic_algorithms(True)
    # torch would fill memory that is not initialised yet, a launch for each tensor; what is read here is written first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
