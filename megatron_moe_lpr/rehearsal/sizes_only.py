"""Tensors of real size whose values are never computed, so that a large model takes no memory and little time.

A large tensor is a reservation of memory that nothing is written to, and the system gives memory only to what is
written. Its storage has a size, an address and a lifetime, so that gradient buffers, views and the freeing of
activations are those of a real step. Whole numbers and truth values are computed: they steer the program (which rows go
where, how many). Small tensors are computed too; what they get from a large one is 1.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from megatron_moe_lpr.rehearsal.storages import StorageLog

LARGE = 1 << 16
"""Elements; tensors of floating point above that are not computed."""
EXECUTED = frozenset(
    ("aten::set_", "aten::resize_", "aten::_local_scalar_dense", "aten::masked_select", "aten::nonzero", "aten::equal")
)
"""Operations on storages, and operations whose result has a size that depends on values."""
VIEWS = frozenset(("aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::detach"))
EMPTY = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided")


class SizesOnly(TorchDispatchMode):
    """Computes whole numbers and small tensors, and of all others the sizes alone; logs every storage.

    A custom autograd function, a hook or a schedule of Megatron's runs as it is: only torch's operations are replaced.
    """

    def __init__(self, log: StorageLog, computes: bool = False) -> None:
        """`computes`: compute every operation, and only log storages."""
        super().__init__()
        self.log, self.computes = log, computes

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, compute every operation."""
        before, self.computes = self.computes, True
        try:
            yield
        finally:
            self.computes = before

    def __torch_dispatch__(
        self, function: Any, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._run(function, args, kwargs)
        self.log.add((args, kwargs), result)
        return result

    def _run(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        facts = _facts(function)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if self.computes or facts.executed or (given and not facts.makes and all(map(_is_light, given))):
            return function(*args, **kwargs)
        if facts.written:
            return _leave_written(facts, function, args, kwargs)
        return _imitate(facts, function, args, kwargs)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What an operation's schema says of it."""

    executed: bool
    """A view, or an operation that must run."""
    makes: bool
    """The result's size does not come from the size of its tensors."""
    written: tuple[int, ...]
    """Positions in the schema of the arguments that it writes to."""
    returned: tuple[int | None, ...]
    """By value returned: position of the argument that it is; None: another one."""
    has_device: bool


@functools.cache
def _facts(function: Any) -> _Facts:
    schema, name = function._schema, function._schema.name
    aliases = [argument.alias_info for argument in schema.arguments]
    written = tuple(index for index, alias in enumerate(aliases) if alias is not None and alias.is_write)
    is_view = not written and any(value.alias_info is not None for value in schema.returns)
    returned = tuple(
        next(
            (
                index
                for index in written
                if value.alias_info is not None and aliases[index].before_set & value.alias_info.before_set
            ),
            None,
        )
        for value in schema.returns
    )
    makes = name.startswith(("aten::new_", "aten::empty_like", "aten::repeat", "aten::constant_pad_nd"))
    has_device = any(argument.name == "device" for argument in schema.arguments)
    return _Facts(is_view or name in EXECUTED | VIEWS, makes, written, returned, has_device)


def _is_light(tensor: torch.Tensor) -> bool:
    """Whether a tensor is computed: small, or of whole numbers. Bytes are what storages are copied as.

    A small view of a large tensor is not: nothing has been written where it lies, and the memory may hold anything.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != torch.uint8:
        return True
    return tensor.numel() <= LARGE and tensor.untyped_storage().nbytes() <= LARGE * tensor.element_size()


def _leave_written(facts: _Facts, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return what an operation that writes returns. A small tensor that it was to fill gets 1."""
    names = [argument.name for argument in function._schema.arguments]

    def argument(index: int) -> Any:
        return args[index] if index < len(args) else kwargs[names[index]]

    for index in facts.written:
        if function._schema.arguments[index].kwarg_only:
            for tensor in tree_leaves(argument(index)):
                if isinstance(tensor, torch.Tensor) and tensor.numel() <= LARGE:
                    tensor.fill_(1)
    values = tuple(None if index is None else argument(index) for index in facts.returned)
    return values[0] if len(values) == 1 else values or None


def _imitate(facts: _Facts, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operation on torch's meta device for the sizes of its result, and reserve memory of these sizes."""
    metas, given = tree_map(_meta, (args, kwargs))
    if facts.has_device:
        given = given | {"device": torch.device("meta")}
        given.pop("pin_memory", None)
    sizes = function(*metas, **given)
    leaves = [leaf for leaf in tree_leaves(sizes) if isinstance(leaf, torch.Tensor)]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if all(map(_is_light, leaves)) and all(map(_is_light, tensors)):
        result = function(*args, **kwargs)
        if function._schema.name in EMPTY:  # type: ignore[attr-defined]
            tree_map(lambda leaf: leaf.zero_() if isinstance(leaf, torch.Tensor) else leaf, result)
        return result
    return tree_map(_reserved, sizes)


def _meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _reserved(value: Any) -> Any:
    """A tensor of the same size in host memory: reserved, ones where it is small, zeros where of whole numbers."""
    if not isinstance(value, torch.Tensor):
        return value
    tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if not value.is_floating_point():
        return tensor.zero_()
    return tensor.fill_(1) if value.numel() <= LARGE else tensor
