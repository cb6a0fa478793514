"""A CUDA device that is this machine's CPU: torch.cuda answers as an H100 would, NCCL is answered by gloo.

Tensors stay where they are. To Transformer Engine and Megatron they say that they lie on the device.
"""

import contextlib
import sys
import types
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_lpr.platform.cpu import collectives, devices, streams

CAPABILITY, CUDA = (9, 0), "13.0"
DEVICES = 8
MORE_FACTORIES = ("rand", "randn", "full_like", "randint", "empty_strided", "eye", "linspace", "randperm", "as_tensor")
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3 (emulated)",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=80 * 2**30,
)


def install() -> None:
    """Answer torch.cuda, and send what asks for the device or for NCCL to the CPU and to gloo."""
    streams.install()
    devices.FACTORIES = (*devices.FACTORIES, *MORE_FACTORIES)
    devices.install()
    collectives.install()
    _answer_queries()
    _say_cuda()
    _answer_nccl()


def _answer_queries() -> None:
    cuda = torch.cuda
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": DEVICES,
        "get_device_name": PROPERTIES.name,
        "get_device_capability": CAPABILITY,
        "get_device_properties": PROPERTIES,
        "is_current_stream_capturing": False,
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "ipc_collect": None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, answer=answer, **kwargs: answer)
    cuda.default_generators = _OneGenerator()
    torch.version.cuda = CUDA


class _OneGenerator:
    """The CPU's, whatever device is asked for."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _say_cuda() -> None:
    def is_cuda(tensor: torch.Tensor) -> bool:
        frame = sys._getframe(1)
        path = frame.f_code.co_filename
        if path.endswith("/hybrid_optimizer.py") and frame.f_locals.get("cpu_copy"):
            return False  # the copy of a parameter that it has just made in host memory
        return not _host_is_chosen() and ("/transformer_engine/" in path or "/megatron/" in path)

    lies_on_the_host = torch.Tensor.is_cpu.__get__

    def is_cpu(tensor: torch.Tensor) -> bool:
        # float8_tensor_storage.py asks before it calls a kernel; Megatron's writer must see the host.
        path = sys._getframe(1).f_code.co_filename
        return lies_on_the_host(tensor) and (_host_is_chosen() or "/transformer_engine/" not in path)

    torch.Tensor.is_cuda, torch.Tensor.is_cpu = property(is_cuda), property(is_cpu)
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    empty = torch.empty
    torch.empty = lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs)
    same_place = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # From a device to the host a quantised tensor travels dequantised; here both are the same place.
        target = kwargs.get("device", args[0] if args else None)
        if str(target) == "cpu" and hasattr(self, "_quantizer"):
            return self.dequantize()
        return same_place(self, *args, **kwargs)

    torch.Tensor.to = to


def _host_is_chosen() -> bool:
    platform = sys.modules.get("megatron_moe_lpr.platform")
    selected = getattr(platform, "_selected", None)
    return selected is not None and selected.name == "cpu"


def _answer_nccl() -> None:
    begin, new_group, send, receive = dist.init_process_group, dist.new_group, dist.isend, dist.irecv

    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # NCCL sends what the memory holds in the order of its stream. gloo reads it later, when the pipeline schedule
        # may have freed it (schedules.py `deallocate_output_tensor`).
        return _WaitedForOnce(send(tensor.clone(), *args, **kwargs))

    def irecv(*args: Any, **kwargs: Any) -> Any:
        return _WaitedForOnce(receive(*args, **kwargs))

    def init_process_group(backend: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> Any:
        return begin("gloo" if backend == "nccl" else backend, *args, **kwargs)

    def gloo_group(*args: Any, backend: str | None = None, pg_options: Any = None, **kwargs: Any) -> Any:
        return new_group(*args, backend="gloo" if backend == "nccl" else backend, **kwargs)

    dist.init_process_group, dist.new_group = init_process_group, gloo_group
    dist._coalescing_manager = dist.distributed_c10d._coalescing_manager = _without_device(dist._coalescing_manager)
    # torch checks that a P2POp's function is the one of its own module.
    dist.isend = dist.distributed_c10d.isend = isend
    dist.irecv = dist.distributed_c10d.irecv = irecv


def _without_device(manager: Any) -> Any:
    """With a device the manager asks the backend to start coalescing, which gloo lacks: call after call does too."""

    @contextlib.contextmanager
    def coalescing_manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Any:
        if device is None:
            with manager(group, None, async_ops) as handle:
                yield handle
        else:
            yield _Finished()

    return coalescing_manager


class _WaitedForOnce:
    """Work that may be waited for again, as NCCL's: gloo's second wait would not end (Transformer Engine waits twice in
    context_parallel.py `AttnFuncWithCPAndKVP2P.backward`)."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.wait()


class _Finished:
    """Work that is done."""

    def wait(self) -> None: ...
