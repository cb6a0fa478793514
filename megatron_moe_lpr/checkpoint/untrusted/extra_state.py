"""Rebuilds Transformer Engine's `_extra_state` from checked values, before Transformer Engine unpickles it.

It is a pickle in a byte tensor (module/base.py `get_extra_state`) of the FP8 recipe, scales and counters, which
Transformer Engine and Megatron unpickle without restriction. They never get the bytes of the file: the restricted
reader reads what these describe, the values are checked, and a new pickle is written from the values.
"""

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.untrusted import fp8_recipes
from megatron_moe_lpr.checkpoint.untrusted.restricted_pickle import Call, check_extent, read_pickle, whole_number
from megatron_moe_lpr.checkpoint.untrusted.torch_files import (
    REBUILD,
    check_tensor,
    elements_needed,
    load_file,
    load_storage,
)
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.moe.expert_states import EXTRA_STATE

VARIABLES = "extra_fp8_variables"
OBJECTS = ("recipe", "scaling_fwd", "scaling_bwd", "fp8_group", "global_recipe", "buffer_index_and_autocast_key")
"""Names under which Transformer Engine keeps objects; plain variables must not have them."""
STORAGES = (("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes"))
"""What a tensor's storage is pickled with: torch's function, and what megatron-core puts in its place from 0.17 on."""
ALLOW_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Without it newer versions of Transformer Engine refuse the pickled state of delayed scaling (`_extra_state.py`)."""
MAX_NUMBER = 1 << 62
MAX_EXPERTS = 1 << 16
MAX_DEPTH = 4


def check_extra_states(state: Any, directory: Path) -> None:
    """Replace each `_extra_state` of a loaded state dict, in place, by one rebuilt from its checked values.

    Raises:
        UserError: naming the entry that holds more than tensors, plain values and FP8 recipes.
    """
    for path, table, key in list(_entries(state, "")):
        try:
            table[key] = _rebuilt(table[key])
        except Exception as error:  # a damaged pickle raises almost anything
            raise UserError(f"{directory}: the object {path} cannot be read: {error}") from None


@contextlib.contextmanager
def checked_pickles_are_read() -> Iterator[None]:
    """Inside, Transformer Engine reads the states that `check_extra_states` has written; load no others."""
    before = os.environ.get(ALLOW_PICKLES)
    os.environ[ALLOW_PICKLES] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ALLOW_PICKLES]
        else:
            os.environ[ALLOW_PICKLES] = before


def _entries(state: Any, path: str) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """Every `_extra_state` below `state`: its path, the dict that holds it, and its key there."""
    if isinstance(state, dict):
        for key, value in state.items():
            if EXTRA_STATE in str(key):
                yield f"{path}{key}", state, key
            else:
                yield from _entries(value, f"{path}{key}.")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from _entries(value, f"{path}{index}.")


def _rebuilt(value: Any) -> torch.Tensor | None:
    if value is None:
        return None
    if isinstance(value, io.BytesIO):
        # The form of Transformer Engine before 2.0.
        content = load_file(io.BytesIO(value.getvalue())) if value.getbuffer().nbytes else None
    elif type(value) is torch.Tensor and value.dtype == torch.uint8:
        content = _described(value) if value.numel() else None
    else:
        raise pickle.UnpicklingError(f"a {type(value).__name__} is not expected there")
    if content is None:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(pickle.dumps(_checked(content))), dtype=torch.uint8)


def _described(value: torch.Tensor) -> Any:
    content = value.detach().cpu().contiguous().numpy().tobytes()
    described = read_pickle(io.BytesIO(content), _is_allowed)
    check_extent(described, len(content))
    return described


def _is_allowed(module: str, name: str) -> bool:
    known = (REBUILD, *STORAGES, ("collections", "OrderedDict"))
    return (module, name) in known or fp8_recipes.is_allowed(module, name)


def _checked(content: Any) -> dict[str, Any]:
    if type(content) is not dict or not all(type(key) is str for key in content):
        raise pickle.UnpicklingError("it is no table of names")
    state = {name: _value(value) for name, value in content.items() if name != VARIABLES}
    if VARIABLES in content:
        state[VARIABLES] = _variables(content[VARIABLES])
    if "recipe" in state and not fp8_recipes.is_recipe(state["recipe"]):
        raise pickle.UnpicklingError("its recipe is none")
    for scale, history in (("scale_fwd", "amax_history_fwd"), ("scale_bwd", "amax_history_bwd")):
        _check_scales(state.get(scale), state.get(history))
    return state


def _check_scales(scale: Any, history: Any) -> None:
    """Check a layer's scales, shape [tensors], and the history of largest values, shape [steps, tensors]."""
    for value, dimensions in ((scale, 1), (history, 2)):
        if value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or value.dim() != dimensions:
            raise pickle.UnpicklingError("a scale is not a float32 tensor of its form")
    if scale is not None and history is not None and history.shape[1] != scale.shape[0]:
        raise pickle.UnpicklingError("its scales and their history are of different numbers of tensors")


def _variables(found: Any) -> dict[str, Any]:
    if type(found) is not dict or not all(type(name) is str and name not in OBJECTS for name in found):
        raise pickle.UnpicklingError("its variables are no table of names, or take the names of others")
    variables = {name: _value(value) for name, value in found.items()}
    if any(isinstance(value, torch.Tensor) for value in variables.values()):
        raise pickle.UnpicklingError("a tensor is among its variables")
    whole_number(variables.get("num_gemms", 1), MAX_EXPERTS)
    return variables


def _value(found: Any, depth: int = 0) -> Any:
    if found is None or type(found) in (bool, float, str):
        return found
    if type(found) is int and abs(found) < MAX_NUMBER:
        return found
    if type(found) in (list, tuple) and depth < MAX_DEPTH and len(found) <= 1000:
        return type(found)(_value(value, depth + 1) for value in found)
    if type(found) is torch.Tensor:
        return found.detach().clone()
    if type(found) is Call:
        return _tensor(found) if found.function == REBUILD else fp8_recipes.rebuild(found)
    raise pickle.UnpicklingError(f"a {type(found).__name__} is not expected in it")


def _tensor(found: Call) -> torch.Tensor:
    storage, offset, shape, strides = check_tensor(found)
    is_storage = type(storage) is Call and storage.function in STORAGES and storage.state is None
    if not is_storage or len(storage.arguments) != 1 or type(storage.arguments[0]) is not bytes:
        raise pickle.UnpicklingError("a tensor has no storage")
    values = load_storage(storage.arguments[0])
    if elements_needed(offset, shape, strides) > len(values):
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return torch.as_strided(values, shape, strides, offset).clone()
