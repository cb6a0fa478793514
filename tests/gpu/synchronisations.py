"""Counts the places where the host waits for the device, on the emulated device: with the line that waits.

A wait is an event or stream that is synchronised, a blocking copy to the host, and an operation whose result the host
needs to go on (`nonzero`, a boolean index, `item`, `bool`, `tolist`). A copy started with `non_blocking` is none; the
event after it is.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moe_lpr.platform.cpu.streams import FinishedEvent, InOrderStream

aten = torch.ops.aten
DYNAMIC = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten._unique2.default: "unique",
}
HERE = Path(__file__)


class Waits(TorchDispatchMode):
    """`counts`: how often each (operation, "file:function") made the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._on_host: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = DYNAMIC.get(function)
        if function in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            name = "boolean index"
        if name and not self.is_on_host(args[0]):
            self.add(name)
        return function(*args, **(kwargs or {}))

    def add(self, operation: str) -> None:
        """Count a wait of the line that is being run."""
        self.counts[operation, _site()] += 1

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor was copied to the host or made there: on the emulated device both are the CPU."""
        return tensor.untyped_storage()._cdata in self._on_host

    def put_on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values, known to lie on the host."""
        copied = tensor.detach().clone()
        storage = copied.untyped_storage()
        self._on_host[storage._cdata] = storage
        return copied


@contextlib.contextmanager
def counted() -> Iterator[Waits]:
    """Count within the context, in this thread."""
    waits = Waits()
    to, numpy, tolist, tensor = torch.Tensor.to, torch.Tensor.numpy, torch.Tensor.tolist, torch.tensor

    def copied(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        target = kwargs.get("device", args[0] if args else None)
        if not _is_host(target) or waits.is_on_host(self):
            return to(self, *args, **kwargs)
        if not kwargs.get("non_blocking"):
            waits.add("copy to the host")
        return waits.put_on_host(to(self, *args, **kwargs))

    def read(original: Any, name: str) -> Any:
        def reading(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not waits.is_on_host(self):
                waits.add(name)
            return original(self, *args, **kwargs)

        return reading

    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = tensor(*args, **kwargs)
        return result if kwargs.get("device") is not None else waits.put_on_host(result)

    def synchronize(self: Any) -> None:
        waits.add("synchronize")

    replaced = [
        patch.object(torch.Tensor, "to", copied),
        patch.object(torch.Tensor, "cpu", lambda self: copied(self, "cpu")),
        patch.object(torch.Tensor, "numpy", read(numpy, "numpy")),
        patch.object(torch.Tensor, "tolist", read(tolist, "tolist")),
        patch.object(torch, "tensor", made),
        patch.object(FinishedEvent, "synchronize", synchronize),
        patch.object(InOrderStream, "synchronize", synchronize),
        patch.object(torch.cuda, "synchronize", lambda *args: waits.add("synchronize")),
    ]
    with contextlib.ExitStack() as stack:
        for replacement in replaced:
            stack.enter_context(replacement)
        stack.enter_context(waits)
        yield waits


def _is_host(target: Any) -> bool:
    """Only by name: the emulated device is a torch.device("cpu") too, which `current_device` answers as an object."""
    return target == "cpu" and isinstance(target, str) or _from_dispatcher(target)


def _from_dispatcher(target: Any) -> bool:
    # moe_utils.py `maybe_move_tensor_to_cpu` names the host as an object.
    names = (frame.name for frame in traceback.extract_stack(limit=5))
    return isinstance(target, torch.device) and "maybe_move_tensor_to_cpu" in names


def _site() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path != HERE and "torch" not in path.parts and "unittest" not in path.parts and "emulation" not in path.parts[:-1]:
            return f"{path.name}:{frame.name}"
    return "?"
