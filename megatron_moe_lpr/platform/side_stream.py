"""Work on a second stream of the device, as Megatron's shared experts do it (moe/shared_experts.py)."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Tensors = TypeVar("Tensors", bound=tuple[torch.Tensor, ...])


class SideStream:
    """A stream for work that begins at `fork` and is joined before its results are used.

    Three rules keep memory and numbers right:

    - The work waits for everything launched on the current stream before `fork`. Its inputs must have been made by
      then, and must be held until `join`: their memory is then reused by the current stream only, after the work.
    - After `join` the current stream waits for the work. The results lie in the side stream's memory and are used on
      the current one: `record_stream` keeps the allocator from giving that memory to the side stream's next work.
    - torch runs the backward of an operation on the stream of its forward, and lets streams wait for the gradients that
      pass between them, with `record_stream` (autograd's `InputBuffer`). Backward therefore needs no code here, nor
      does activation recompute, which runs the forward in the backward pass.

    Transformer Engine's products share one workspace a device (cpp_extensions/gemm.py `get_cublas_workspace`), except
    grouped products, which have their own. During this work the current stream may compute no other products of
    Transformer Engine's.
    """

    _stream: torch.cuda.Stream | None = None
    """One stream for all layers: work of two layers never overlaps."""

    def stream(self) -> torch.cuda.Stream:
        """The stream, made on first use."""
        if SideStream._stream is None:
            SideStream._stream = torch.cuda.Stream()
        return SideStream._stream

    def fork(self) -> None:
        """Let the side stream wait for everything launched on the current stream so far."""
        self.stream().wait_stream(torch.cuda.current_stream())

    def run(self, work: Callable[[], Tensors]) -> Tensors:
        """Launch `work` on the side stream; its results may be used after `join`."""
        with torch.cuda.stream(self.stream()):
            return work()

    def join(self, results: Tensors) -> Tensors:
        """Let the current stream wait for the work; returns `results`, which may be used now."""
        current = torch.cuda.current_stream()
        current.wait_stream(self.stream())
        for tensor in results:
            tensor.record_stream(current)
        return results


@contextlib.contextmanager
def behind_current(stream: torch.cuda.Stream) -> Iterator[None]:
    """Launch on `stream` while the block runs, after everything launched on the current one so far."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
