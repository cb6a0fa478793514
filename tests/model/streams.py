"""A race detector for streams: finds uses of memory that no wait orders.

Each stream has a vector clock. An operation may use a tensor only if its stream has waited for the operation that wrote
it, and may write it only if its stream has waited for all that read it. Freed memory returns to the stream that it was
allocated on, which must have waited for every use, unless `record_stream` named the other stream (torch's caching
allocator).

Only a forward pass can be checked: on the CPU autograd runs every backward operation on the one stream there is.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moe_lpr.platform.side_stream import SideStream


class Stream:
    """A vector clock: for each stream, how many of its operations this one has waited for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: Counter[Stream] = Counter()

    def wait_stream(self, other: "Stream") -> None:
        self.seen |= other.seen  # the larger of each

    def record_event(self) -> "Stream":
        """An event behind all operations of the stream so far."""
        event = Stream()
        event.wait_stream(self)
        return event

    def synchronize(self) -> None:
        """The host waits, which orders all later launches; this stricter stand-in still wants a wait by each stream."""


class _Memory:
    """A storage: the stream that allocated it, its last writer, and each stream's last use."""

    def __init__(self, storage: torch.UntypedStorage, home: Stream, kept: bool) -> None:
        self.reference, self.home, self.kept = StorageWeakRef(storage), home, kept
        self.writer: tuple[Stream, int] = (home, home.seen[home])
        self.uses: Counter[Stream] = Counter()
        self.recorded: set[Stream] = set()
        self.names: dict[Stream, str] = {}
        """The last operation of each stream that used it."""


class Watch(TorchDispatchMode):
    """`faults`: messages about races; `beside`: counts of operations that ran on another stream than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.current = Stream()
        self.faults: list[str] = []
        self.beside: Counter[str] = Counter()
        self.memory: dict[int, _Memory] = {}
        self.shared: dict[int, _Memory] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._check_freed()
        stream = self.current
        stream.seen[stream] += 1
        if stream is not self.first:
            self.beside[function.name()] += 1
        inputs = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        written = _written(function, args)
        for tensor in inputs:
            self._use(tensor, function.name(), any(tensor is value for value in written))
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._memory_behind(tensor, kept=False)
        return result

    def copy_to_host(self, tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """Megatron's `maybe_move_tensor_to_cpu`, as on a device."""
        if not torch.is_tensor(tensor):
            return tensor
        self.current.seen[self.current] += 1
        self._use(tensor, "the copy to the host", writes=False)
        if record_stream:
            self.record_stream(tensor, self.current)
        with torch.utils._python_dispatch._disable_current_modes():
            return tensor.clone().numpy() if as_numpy else tensor.clone()

    def record_stream(self, tensor: torch.Tensor, stream: Stream) -> None:
        self._memory_behind(tensor).recorded.add(stream)

    def _memory_behind(self, tensor: torch.Tensor, kept: bool = True) -> _Memory:
        """The record of a tensor's storage; `kept`: it existed before the watch, allocated by no known stream."""
        storage = tensor.untyped_storage()
        known = self.memory.get(storage._cdata)
        if known is None or known.reference.expired():
            known = self.memory[storage._cdata] = _Memory(storage, self.first if kept else self.current, kept)
            if kept:
                known.writer = (self.first, 0)
        return known

    def _use(self, tensor: torch.Tensor, name: str, writes: bool) -> None:
        memory, stream = self._memory_behind(tensor), self.current
        writer, time = memory.writer
        if stream.seen[writer] < time:
            self.faults.append(f"{name} uses what another stream may not have written")
        if writes:
            if any(stream.seen[user] < until for user, until in memory.uses.items()):
                self.faults.append(f"{name} writes what another stream may still read")
            memory.writer = (stream, stream.seen[stream])
        memory.uses[stream], memory.names[stream] = stream.seen[stream], name
        if stream is not memory.home:
            self.shared[id(memory)] = memory

    def _check_freed(self) -> None:
        for key, memory in [*self.shared.items()]:
            if not memory.reference.expired():
                continue
            del self.shared[key]
            unknown = [
                memory.names[user]
                for user, until in memory.uses.items()
                if user not in memory.recorded and memory.home.seen[user] < until
            ]
            if unknown and not memory.kept:
                self.faults.append(f"memory is given away that another stream may still use for {', '.join(unknown)}")


def _written(function: Any, args: tuple) -> list[Any]:
    """Arguments the operation writes to, by its schema."""
    arguments = zip(function._schema.arguments, args, strict=False)
    named = [value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write]
    return [tensor for value in named for tensor in (value if isinstance(value, list | tuple) else [value])]


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Watch every operation within; streams made before are forgotten."""
    watch = Watch()

    @contextlib.contextmanager
    def on(stream: Any) -> Iterator[None]:
        before, watch.current = watch.current, stream
        yield
        watch.current = before

    with contextlib.ExitStack() as stack:
        for replacement in (
            patch.object(torch.cuda, "Stream", Stream),
            patch.object(torch.cuda, "current_stream", lambda *args: watch.current),
            patch.object(torch.cuda, "stream", on),
            patch.object(torch.Tensor, "record_stream", lambda tensor, stream: watch.record_stream(tensor, stream)),
            patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", watch.copy_to_host),
            patch.object(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None),
            patch.object(SideStream, "_stream", None),
        ):
            stack.enter_context(replacement)
        stack.enter_context(watch)
        yield watch
