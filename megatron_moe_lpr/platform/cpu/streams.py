"""torch.cuda's streams, events and random states for one device that works in order."""

import contextlib
from typing import Any

import torch

from megatron_moe_lpr.megatron.overriding import replace


class InOrderStream:
    """Stand-in for every CUDA stream: work on the CPU is finished when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or FinishedEvent()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InOrderStream)

    def __hash__(self) -> int:
        return 0

    def __enter__(self) -> "InOrderStream":
        return self

    def __exit__(self, *error: Any) -> None: ...


class FinishedEvent:
    """Stand-in for a CUDA event that has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def install() -> None:
    """Replace the parts of torch.cuda that Megatron calls without checking for a device."""
    stream, cpu = InOrderStream(), torch.device("cpu")
    # token_dispatcher.py, param_and_grad_buffer.py, p2p_communication.py: side streams for copies and overlap
    replace(
        torch.cuda,
        Stream=InOrderStream,
        Event=FinishedEvent,
        current_stream=lambda *args, **kwargs: stream,
        default_stream=lambda *args, **kwargs: stream,
        stream=lambda *args, **kwargs: contextlib.nullcontext(),
        synchronize=lambda *args, **kwargs: None,
    )
    replace(torch.Tensor, record_stream=lambda self, stream: None)
    # everywhere: torch.empty(..., device=torch.cuda.current_device())
    replace(
        torch.cuda,
        current_device=lambda: cpu,
        set_device=lambda *args, **kwargs: None,
        empty_cache=lambda: None,
    )
    # tensor_parallel/random.py: the model-parallel random number tracker
    replace(
        torch.cuda,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        manual_seed=lambda seed: torch.manual_seed(seed),
    )
