"""What a forward and a backward pass would launch on a GPU, counted on the emulated device.

An operation counts where torch dispatches it, below autograd, with the kernels that its CUDA implementation launches
(`KERNELS`). An emulated kernel of Transformer Engine's counts as the kernels that it stands for, a function that torch
compiles as one. Views and allocations launch nothing. Collectives are counted apart.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.gpu.storages import compiled_functions, places_of_kernels

NOTHING = {
    *("alias", "detach", "empty", "empty_like", "empty_strided", "is_pinned", "lift_fresh", "new_empty"),
    *("new_empty_strided", "record_stream", "resize", "set", "_has_compatible_shallow_copy_type", "_reshape_alias"),
    *("_unsafe_view", "_local_scalar_dense", "squeeze", "unsqueeze"),
}
"""Operations that allocate memory or make a view: no kernel."""
KERNELS = {"cumsum": 2, "index_add": 2, "masked_select": 4, "nonzero": 4, "sort": 4, "topk": 3}
"""Kernels of one call, about, in torch/aten/src/ATen/native/cuda; one of all other operations."""
FILLED = {"constant_pad_nd", "select_backward", "slice_backward"}
"""A fill of the whole and a copy of the part."""
PRODUCTS = {"addmm", "addmv", "baddbmm", "bmm", "dot", "mm", "mv"}
TE_PRODUCTS = {"generic_gemm", "te_general_grouped_gemm"}
TE_KERNELS = {"fused_attn_bwd": 4, "fused_attn_fwd": 2, "make_row_id_map": 3, "rmsnorm_bwd": 2}
"""Kernels of one call of Transformer Engine's, where it is more than one."""
GATHERS = {"embedding", "gather", "index", "index_select"}
CONSTANTS = {"arange", "fill", "full", "full_like", "new_full", "new_ones", "new_zeros", "ones", "ones_like"} | {
    *("scalar_tensor", "zero", "zeros", "zeros_like"),
}
"""Operations that write and read nothing."""
MAIN_GRADIENT = "distributed_data_parallel.py"
"""Megatron's file whose hooks add gradients to the fp32 buffer."""

ON_THE_HOST = {
    ("platform/cpu/collectives.py", ""),
    ("emulation/device.py", "isend"),
    ("tensor_parallel/random.py", "fork"),
    ("moe/dispatch_counts.py", "add_up_on_host"),
}
"""File and function of operations that launch nothing on a GPU: Python that does part of an emulated collective's work,
the copy of a tensor that gloo sends, Megatron's comparison of the host's own random states, sums of what has been
copied to the host."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One dispatched operation."""

    name: str
    launches: int
    bytes: int
    """That it reads and writes, each tensor once."""
    kind: str
    """product, main gradient or other."""
    place: str
    """File, line and function of Megatron's, Transformer Engine's or this package's, and autograd's node."""


class Launches(TorchDispatchMode):
    """`operations`: all that is launched while it is active; `collectives`: how many calls of process groups."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.collectives = 0
        self._in_kernel = 0

    def __torch_dispatch__(
        self, function: Any, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._in_kernel:
            self._add(function, (args, kwargs), result)
        return result

    @contextlib.contextmanager
    def leave_out(self) -> Iterator[None]:
        """Count nothing inside."""
        self._in_kernel += 1
        try:
            yield
        finally:
            self._in_kernel -= 1

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Count inside, emulated kernels and compiled functions as one operation each."""
        with contextlib.ExitStack() as stack:
            for module, name in [*places_of_kernels(), *compiled_functions()]:
                function = getattr(module, name)
                stack.callback(setattr, module, name, function)
                setattr(module, name, self._as_one(name, function))
            stack.enter_context(patch.object(dist, "reduce_scatter_tensor", self._scatter(dist.reduce_scatter_tensor)))
            with self:
                yield

    def _scatter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Count gloo's reduce-scatter as a collective alone: when waited for, it copies a part of an all-reduce."""

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with self.leave_out():
                work = function(*args, **kwargs)
            self.collectives += 1
            return None if work is None else _Work(work, self)

        return called

    def _as_one(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if self._in_kernel:
                return function(*args, **kwargs)
            with self.leave_out():
                result = function(*args, **kwargs)
            kind = "product" if name in TE_PRODUCTS else "other"
            size = _kernel_bytes(name, (args, kwargs), result)
            self._record(name, _te_launches(name, args), size, kind)
            return result

        return called

    def _add(self, function: Any, given: Any, result: Any) -> None:
        namespace, _, full_name = function._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            self.collectives += 1
            return
        name = full_name.rstrip("_")
        returns = function._schema.returns
        is_view = returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if is_view or name in NOTHING or not any(tensor.numel() for tensor in _tensors(result)):
            return
        kind = "product" if name in PRODUCTS else "other"
        launches = 2 if name in FILLED else KERNELS.get(name, 1)
        self._record(name, launches, _bytes(name, full_name.endswith("_"), given, result), kind)

    def _record(self, name: str, launches: int, size: int, kind: str) -> None:
        place = _place()
        if place is None:
            return
        kind = "main gradient" if place.startswith(MAIN_GRADIENT) else kind
        self.operations.append(Operation(name, launches, size, kind, place))

    def by_place(self) -> Counter[tuple[str, str]]:
        """Launches by place and name of the operation."""
        found: Counter[tuple[str, str]] = Counter()
        for operation in self.operations:
            found[operation.place, operation.name] += operation.launches
        return found


class _Work:
    """A collective that nothing is counted of when it is waited for."""

    def __init__(self, work: Any, log: Launches) -> None:
        self.work, self.log = work, log

    def wait(self) -> None:
        with self.log.leave_out():
            self.work.wait()


def _te_launches(name: str, args: tuple) -> int:
    if name == "te_general_grouped_gemm":
        # A product for each expert with rows.
        pairs = zip(args[0], args[2], strict=True)
        return sum(bool(left.size().numel() and right.size().numel()) for left, right in pairs) or 1
    return TE_KERNELS.get(name, 1)


def _kernel_bytes(name: str, given: Any, result: Any) -> int:
    inputs, outputs = _tensors(given), _tensors(result)
    if name == "permute_with_mask_map":  # of all tokens it reads the chosen rows
        return 2 * _size(outputs[0]) + _size(inputs[1]) + 2 * sum(map(_size, outputs[1:]))
    if name == "unpermute_with_mask_map":
        return _size(inputs[0]) + _size(inputs[1]) + sum(map(_size, outputs))
    places = {tensor.data_ptr() for tensor in inputs if tensor.numel()}
    return sum(map(_size, inputs)) + sum(_size(tensor) for tensor in outputs if tensor.data_ptr() not in places)


def _bytes(name: str, in_place: bool, given: Any, result: Any) -> int:
    inputs, outputs = _tensors(given), _tensors(result)
    written = sum(map(_size, outputs))
    if name in CONSTANTS:
        return written
    if name in FILLED:
        return written + 2 * _size(inputs[0])
    if name in GATHERS:
        return 2 * written + sum(map(_size, inputs[1:]))
    if name == "copy":
        return _size(inputs[0]) + _size(inputs[1])
    if name in ("index_add", "scatter_add"):  # reads and writes the rows, and copies the whole first unless in place
        return 3 * _size(inputs[-1]) + _size(inputs[1]) + (0 if in_place else 2 * _size(inputs[0]))
    return sum(map(_size, inputs)) + written


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    """Bytes; what `expand` repeats counts once."""
    count = tensor.numel()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count //= length if stride == 0 and length > 1 else 1
    return count * tensor.element_size()


def _place() -> str | None:
    """File:line:function that launches, with autograd's node in backward; None: of `ON_THE_HOST`."""
    node = torch._C._current_autograd_node()
    suffix = f" ({node.name()})" if node is not None else ""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(path.endswith(file) and name in ("", frame.f_code.co_name) for file, name in ON_THE_HOST):
            return None
        is_wrapped = any(part in path for part in ("/emulation/", "/platform/cpu/", "/site-packages/torch/"))
        if not is_wrapped and any(
            part in path for part in ("/megatron/", "/transformer_engine/", "/megatron_moe_lpr/")
        ):
            return f"{path.rsplit('/', 1)[-1]}:{frame.f_lineno}:{frame.f_code.co_name}{suffix}"
        frame = frame.f_back
    return suffix.strip() or "?"


def host_milliseconds(run: Callable[[], None]) -> float:
    """CPU time of a function, without what emulated kernels and compiled functions take."""
    spent, depth = 0.0, 0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent, depth
            began, depth = time.process_time(), depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                spent += 0.0 if depth else time.process_time() - began

        return called

    with contextlib.ExitStack() as stack:
        for module, name in [*places_of_kernels(), *compiled_functions()]:
            function = getattr(module, name)
            stack.callback(setattr, module, name, function)
            setattr(module, name, timed(function))
        began = time.process_time()
        run()
        return 1e3 * (time.process_time() - began - spent)
