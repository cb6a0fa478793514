"""What an emulated kernel is: a function of the extension, the place that calls it, and what it refuses."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""Every emulated function of the extension by its name there."""
CALLERS: dict[str, str] = {}
"""The same names: file and function of Transformer Engine's Python part that call it."""
CALLS: dict[str, int] = {}
"""How often each was called in this process."""


class KernelRefuses(RuntimeError):
    """What a Hopper device or its libraries would refuse."""


def refuse_unless(condition: bool, message: str) -> None:
    """Raise KernelRefuses with the message where the condition does not hold."""
    if not condition:
        raise KernelRefuses(message)


def contiguous(what: str, *tensors: torch.Tensor | None) -> None:
    """Kernels that take a pointer and sizes would read other numbers through strides."""
    for tensor in tensors:
        refuse_unless(tensor is None or tensor.is_contiguous(), f"{what}: a tensor is not contiguous")


def kernel(caller: str) -> Callable[[Function], Function]:
    """Make a function one of the extension's.

    Args:
        caller: the place in Transformer Engine 2.11 that calls it, relative to transformer_engine/pytorch.
    """

    def register(function: Function) -> Function:
        FUNCTIONS[function.__name__], CALLERS[function.__name__] = counted(function), caller
        return FUNCTIONS[function.__name__]

    return register


def counted(function: Function) -> Function:
    """The function, refusing tensors on the host and keeping count of its calls."""
    name = function.__name__

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        _refuse_host_tensors(name)
        CALLS[name] = CALLS.get(name, 0) + 1
        return function(*args, **kwargs)

    return called


def _refuse_host_tensors(name: str) -> None:
    """With --platform cpu the tensors of a real machine lie on the host, where no kernel reaches them."""
    platform = sys.modules.get("megatron_moe_lpr.platform")
    selected = getattr(platform, "_selected", None)
    on_host = selected is not None and selected.name == "cpu"
    refuse_unless(not on_host, f"{name}: a CUDA kernel was called with tensors of --platform cpu")
