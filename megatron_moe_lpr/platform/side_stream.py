"""Work beside the device's current stream, as Megatron's shared experts have it (moe/shared_experts.py)."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Tensors = TypeVar("Tensors", bound=tuple[torch.Tensor, ...])


class SideStream:
    """A stream for work that begins at a fork and is joined before anything uses what it made.

    Three rules keep memory and numbers right:

    - Work waits for what the current stream was given before `fork`. What it reads must have been made by then, and
      must be held until `join`: then the allocator gives the memory away on the current stream alone, behind the work.
    - After `join` the current stream waits for the work. What the work made comes from the side stream's memory, and is
      used on the current one: the allocator is told, or it might give the memory to the side stream's next work.
    - torch runs the backward of an operation on the stream of its forward, and lets streams wait for the gradients that
      pass between them, telling the allocator (autograd's `InputBuffer`). Nothing is left to do there, also where
      activation recompute runs the forward in the backward pass.

    Transformer Engine's products share one workspace a device (cpp_extensions/gemm.py `get_cublas_workspace`), except
    for the grouped ones, which have their own. Beside this work the current stream must therefore compute no other
    products of Transformer Engine's.
    """

    _stream: torch.cuda.Stream | None = None
    """One for all layers: work of two layers never overlaps."""

    def stream(self) -> torch.cuda.Stream:
        """The stream, made on first use."""
        if SideStream._stream is None:
            SideStream._stream = torch.cuda.Stream()
        return SideStream._stream

    def fork(self) -> None:
        """What runs later may begin as soon as the current stream has done what it was given so far."""
        self.stream().wait_stream(torch.cuda.current_stream())

    def run(self, work: Callable[[], Tensors]) -> Tensors:
        """Launch what `work` launches; its results are for `join`."""
        with torch.cuda.stream(self.stream()):
            return work()

    def join(self, made: Tensors) -> Tensors:
        """The current stream goes on when the work is done, of which `made` are the results."""
        current = torch.cuda.current_stream()
        current.wait_stream(self.stream())
        for tensor in made:
            tensor.record_stream(current)
        return made


@contextlib.contextmanager
def behind_current(stream: torch.cuda.Stream) -> Iterator[None]:
    """Launch on `stream`, after what the current one was given so far."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
