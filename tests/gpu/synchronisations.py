"""Counts the places where the host waits for the device, on the emulated device: with the line that waits.

A wait is an event or stream that is synchronised, a blocking copy to the host, one of the host's own numbers to the
device (`torch.tensor(1, device=...)`: torch waits for the stream that copies from memory that is not pinned), and an
operation whose result the host needs to go on (`nonzero`, a boolean index, `item`, `bool`, `tolist`). A copy started
with `non_blocking` is none; the event after it is.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.transformer.moe import token_dispatcher
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
EMULATION = HERE.parents[1] / "emulation"
HOST_ONLY = {"gpt_dataset.py", "random.py"}
"""Megatron's samples and its states of random numbers lie on the host."""
WRAPPERS = {"emulation/device.py", "platform/cpu"}


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
        # One value at a mask is a masked fill (ATen's `canDispatchToMaskedFill`), which needs no indices.
        if name and function is not aten.index.Tensor and len(args) > 2 and args[2].numel() == 1:
            name = None
        if name and not self.is_on_host(args[0]):
            self.add(name)
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if tensors and all(map(self.is_on_host, tensors)) and isinstance(result, torch.Tensor):
            self._keep(result)
        return result

    def add(self, operation: str) -> None:
        """Count a wait of the line that is being run."""
        if site := _site():
            self.counts[operation, site] += 1

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor was copied to the host or made there: on the emulated device both are the CPU."""
        return tensor.untyped_storage()._cdata in self._on_host

    def put_on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values, known to lie on the host."""
        copied = tensor.detach().clone()
        self._keep(copied)
        return copied

    def _keep(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._on_host[storage._cdata] = storage  # held, so that no other storage takes its place


@contextlib.contextmanager
def counted() -> Iterator[Waits]:
    """Count within the context, in this thread."""
    waits = Waits()
    to, cuda, numpy, tolist = torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.numpy, torch.Tensor.tolist

    def copied(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        target = kwargs.get("device", args[0] if args else None)
        if _is_device(target) and waits.is_on_host(self):
            return sent(self, kwargs.get("non_blocking"))
        if not _is_host(target) or waits.is_on_host(self):
            return to(self, *args, **kwargs)
        if not kwargs.get("non_blocking"):
            waits.add("copy to the host")
        return waits.put_on_host(to(self, *args, **kwargs))

    def sent(self: torch.Tensor, non_blocking: bool | None = False) -> torch.Tensor:
        if not waits.is_on_host(self):
            return cuda(self)
        if not non_blocking:
            waits.add("copy to the device")
        return self.detach().clone()  # another storage, which is not the host's

    def read(original: Any, name: str) -> Any:
        def reading(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not waits.is_on_host(self):
                waits.add(name)
            return original(self, *args, **kwargs)

        return reading

    def made(original: Any) -> Any:
        def making(*args: Any, **kwargs: Any) -> torch.Tensor:
            result = original(*args, **kwargs)
            if kwargs.get("device") is None or _is_host(kwargs["device"]):
                return waits.put_on_host(result)
            if not isinstance(args[0], torch.Tensor) or waits.is_on_host(args[0]):
                waits.add("copy to the device")
            return result

        return making

    def started(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if not torch.is_tensor(value):
            return value
        copy = waits.put_on_host(value)
        return copy.numpy() if as_numpy else copy

    def synchronize(self: Any) -> None:
        waits.add("synchronize")

    replaced = [
        patch.object(torch.Tensor, "to", copied),
        patch.object(torch.Tensor, "cpu", lambda self: copied(self, "cpu")),
        patch.object(torch.Tensor, "cuda", lambda self, *args, **kwargs: sent(self, kwargs.get("non_blocking"))),
        patch.object(torch.Tensor, "numpy", read(numpy, "numpy")),
        patch.object(torch.Tensor, "tolist", read(tolist, "tolist")),
        patch.object(torch, "tensor", made(torch.tensor)),
        patch.object(torch, "as_tensor", made(torch.as_tensor)),
        patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", started),
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
    """Only by name: the emulated device, too, is a torch.device("cpu"), which is passed as an object."""
    return isinstance(target, str) and target == "cpu"


def _is_device(target: Any) -> bool:
    return isinstance(target, torch.device) or (isinstance(target, str) and target.startswith("cuda"))


def _site() -> str | None:
    """The innermost line that is neither torch's nor a wrapper's; None: inside an emulated kernel, which on a device
    would not wait."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path == HERE or any(part in WRAPPERS for part in ("/".join(path.parts[-2:]), "/".join(path.parts[-3:-1]))):
            continue
        if "/site-packages/torch/" in str(path) or path.name == "contextlib.py":
            continue
        return None if path.parent == EMULATION or path.name in HOST_ONLY else f"{path.name}:{frame.name}"
    return None
