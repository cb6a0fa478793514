"""What an emulated kernel is: a function of the extension, the place that calls it, and what it refuses."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from tests.emulation.table import TABLE, Signature, check_for

Function = TypeVar("Function", bound=Callable[..., Any])

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""Every emulated function of the extension by its name there."""
CALLERS: dict[str, str] = {}
"""The same names: file and function of Transformer Engine's Python part that call it."""
UNFIT: dict[str, list[Callable[..., Any]]] = {}
"""Functions for other versions, by the name that these have for them."""
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


def kernel(caller: str, name: str = "") -> Callable[[Function], Function]:
    """Make a function one of the extension's, in the versions of Transformer Engine that have its name and arguments.

    Args:
        caller: the place in Transformer Engine that calls it, relative to transformer_engine/pytorch.
        name: what the extension calls it, where versions need more than one function; otherwise the function's name.
    """

    def register(function: Function) -> Function:
        known = name or function.__name__
        signature = TABLE.functions.get(known)
        if signature is None or not _fits(function, signature):
            UNFIT.setdefault(known, []).append(function)
            return function
        FUNCTIONS[known], CALLERS[known] = _as_bound(known, signature, counted(function, known)), caller
        return FUNCTIONS[known]

    return register


def _fits(function: Function, signature: Signature) -> bool:
    """Whether the function has the arguments of the extension's, in the same order, with defaults for the same."""
    found = [(part.name, part.default is not part.empty) for part in inspect.signature(function).parameters.values()]
    return found == [(argument.name, argument.optional) for argument in signature]


def without_a_fit() -> list[str]:
    """Functions of this version that are emulated for other arguments only."""
    return sorted(name for name in UNFIT if name in TABLE.functions and name not in FUNCTIONS)


def _as_bound(name: str, signature: Signature, function: Function) -> Function:
    """The function with the checks that pybind11 makes of its arguments, TypeError as there."""
    by_position = {argument.name for argument in signature if argument.positional_only}
    checks = {argument.name: (argument.type, check_for(argument.type)) for argument in signature}
    bound = inspect.signature(function)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        for key in kwargs.keys() - checks.keys():
            raise TypeError(f"{name}: there is no argument {key}")
        for key in kwargs.keys() & by_position:
            raise TypeError(f"{name}: {key} is given by position alone")
        try:
            arguments = bound.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        for key, value in arguments.items():
            kind, is_one = checks[key]
            if not is_one(value):
                raise TypeError(f"{name}: {key} is {kind}, not {type(value).__name__}")
        return function(*args, **kwargs)

    return called


def counted(function: Function, name: str = "") -> Function:
    """The function, refusing tensors on the host and keeping count of its calls under its name."""
    name = name or function.__name__

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
