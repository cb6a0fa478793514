"""Launches of a micro-batch on the emulated device: what a GPU would be given to do, operation by operation.

A kernel of Transformer Engine, and a function that torch would compile, count once or as `KERNELS` has them; an
operation of torch once or as `OPERATIONS` has it. Views, allocations and collectives do not count.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.gpu.storages import StorageLog

NOT_LAUNCHED = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "set_",
    "resize_",
    "lift_fresh",
    "record_stream",
    "_local_scalar_dense",
    "_unsafe_view",
}
OPERATIONS = {"sort": 4, "topk": 3, "cumsum": 2, "index_add": 2, "nonzero": 4, "masked_select": 4, "slice_backward": 2}
"""Kernels of one operation, from torch's sources (ATen/native/cuda): an estimate."""
KERNELS = {"rmsnorm_bwd": 2, "fused_attn_fwd": 2, "fused_attn_bwd": 4, "make_row_id_map": 3}
"""Kernels of one function of Transformer Engine, from its sources: an estimate."""


class LaunchLog(StorageLog):
    """Counts launches while it and its `kernels()` are active."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._in_kernel:
            self.launches[_name(function)] += _launches(function, args, result)
        return result

    def _as_one(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if self._in_kernel:
                return function(*args, **kwargs)
            self.launches[function.__name__] += _kernels(function.__name__, args)
            self._in_kernel = True
            try:
                return function(*args, **kwargs)
            finally:
                self._in_kernel = False

        return called


def _name(operation: Any) -> str:
    return operation._schema.name.partition("::")[2]


def _launches(operation: Any, arguments: tuple, result: Any) -> int:
    """Launches of an operation of torch."""
    returned, name = operation._schema.returns, _name(operation)
    is_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
    same = bool(arguments) and result is arguments[0] and not name.endswith("_")
    if is_view or same or name in NOT_LAUNCHED or operation._schema.name.startswith(("c10d", "_c10d")):
        return 0
    return OPERATIONS.get(name.rstrip("_"), 1)


def _kernels(name: str, arguments: tuple) -> int:
    """Launches of a function of the extension; a grouped product is one for each expert with rows."""
    if name == "te_general_grouped_gemm":
        pairs = zip(arguments[0], arguments[2], strict=True)
        return sum(a.size().numel() > 0 and b.size().numel() > 0 for a, b in pairs)
    return KERNELS.get(name, 1)
