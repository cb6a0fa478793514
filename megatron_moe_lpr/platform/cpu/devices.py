"""Redirects requests for the device "cuda" to the CPU."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_moe_lpr.megatron.overriding import replace

CPU = torch.device("cpu")

# Factories that megatron-core calls with device="cuda" (optimizer/, moe/, distributed/, dist_checkpointing/).
FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "ones_like", "tensor", "zeros", "zeros_like")


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def redirected(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return redirected


def _redirect_tensor_to() -> None:
    """`.cuda()` and `.to("cuda")`, which moe/router.py and pipeline_parallel/schedules.py call."""
    original = torch.Tensor.to

    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    replace(torch.Tensor, to=to, cuda=lambda self, *args, **kwargs: self)


def _redirect_tensor_type() -> None:
    """`.type()` as of a CUDA tensor, for the comparisons in optimizer.py, distrib_optimizer.py and clip_grads.py."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)
        if isinstance(name, str) and "/megatron/core/" in sys._getframe(1).f_code.co_filename.replace("\\", "/"):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    replace(torch.Tensor, type=tensor_type)


def install() -> None:
    """Make every request for a CUDA tensor return one on the CPU."""
    # `with torch.device("meta")` recognises the factories by identity, in a set made on first use: it must hold the
    # originals, or transformers would fill its models with uninitialised memory.
    _device_constructors()
    replace(torch, **{name: _on_cpu(getattr(torch, name)) for name in FACTORIES})
    _redirect_tensor_to()
    _redirect_tensor_type()
