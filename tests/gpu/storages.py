"""Memory of a step on the emulated device, which has no allocator to ask.

Every storage counts once, as long as anything holds it: autograd, an autograd function's context, a pipeline buffer.

A kernel of Transformer Engine counts by what it returns: what its emulation needs inside, the kernel needs not.
"""

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.emulation import permutation
from tests.emulation.kernels import FUNCTIONS
from tests.emulation.names import EXTENSION

DEPTH = 3
"""How deep a tensor may lie in a kernel's arguments: an FP8 tensor is an object of tensors."""


class StorageLog(TorchDispatchMode):
    """Every storage that an operation makes while this is active, under the label of that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.label = ""
        self.peak = 0
        """Most bytes that lived at once."""
        self._made: dict[int, tuple[StorageWeakRef, str]] = {}
        self._bound, self._in_kernel = 0, False

    def live(self) -> Counter[str]:
        """Bytes of what still exists, by label."""
        sizes: Counter[str] = Counter()
        for key, (reference, label) in list(self._made.items()):
            storage = None if reference.expired() else torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._made[key]
            else:
                sizes[label] += storage.nbytes()
        return sizes

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._in_kernel:
            self._add_new(storages_of((args, kwargs)), storages_of(result))
        return result

    def _add_new(self, given: dict[int, torch.UntypedStorage], found: dict[int, torch.UntypedStorage]) -> None:
        for key in found.keys() - given.keys():
            if key not in self._made or self._made[key][0].expired():
                self._made[key] = StorageWeakRef(found[key]), self.label
                self._bound += found[key].nbytes()
        # Nothing that was freed is noticed until the sum of all that was made passes the peak.
        if self._bound > self.peak:
            self._bound = sum(self.live().values())
            self.peak = max(self.peak, self._bound)

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Inside, emulated kernels count by their results."""
        places = [*places_of_kernels(), *compiled_functions("megatron.core.fusions.", "megatron_moe_lpr.")]
        before = [(module, name, getattr(module, name)) for module, name in places]
        for module, name, function in before:
            setattr(module, name, self.as_one(function))
        try:
            yield
        finally:
            for module, name, function in before:
                setattr(module, name, function)

    def as_one(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that counts by its result."""

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if self._in_kernel:
                return function(*args, **kwargs)
            given = storages_of((args, kwargs))
            self._in_kernel = True
            try:
                result = function(*args, **kwargs)
            finally:
                self._in_kernel = False
            # A kernel may also fill an FP8 tensor that it was given with parts that are new.
            self._add_new(given, storages_of((result, args, kwargs)))
            return result

        return called


def compiled_functions(*prefixes: str) -> Iterator[tuple[ModuleType, str]]:
    """Megatron's functions, and this package's, that torch compiles to kernels, which the emulation switches off."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(prefixes or ("megatron.core.", "megatron_moe_lpr.")):
            for name, value in list(vars(module).items()):
                if hasattr(value, "_torchdynamo_orig_callable"):
                    yield module, name


def places_of_kernels() -> Iterator[tuple[ModuleType, str]]:
    """The extension, what imported a kernel from it by name, as Transformer Engine's norms do, and Triton's. None where
    Transformer Engine is missing."""
    if EXTENSION not in sys.modules:
        return
    for name in permutation.TRITON:
        yield sys.modules[permutation.TRITON_MODULE], name
    kernels = {name: getattr(sys.modules[EXTENSION], name) for name in FUNCTIONS}
    for module_name, module in list(sys.modules.items()):
        if module_name == EXTENSION or module_name.startswith("transformer_engine."):
            for name, function in kernels.items():
                if vars(module).get(name) is function:
                    yield module, name


def storages_of(values: Any, depth: int = DEPTH) -> dict[int, torch.UntypedStorage]:
    """Storages of all tensors in a nested structure; of a tensor in FP8 those of its parts."""
    found: dict[int, torch.UntypedStorage] = {}
    for leaf in tree_leaves(values):
        if type(leaf) in (torch.Tensor, torch.nn.Parameter):
            storage = leaf.untyped_storage()
            found[storage._cdata] = storage
        elif depth and type(leaf).__module__.startswith("transformer_engine."):
            found |= storages_of(list(vars(leaf).values()) if hasattr(leaf, "__dict__") else [], depth - 1)
    return found
