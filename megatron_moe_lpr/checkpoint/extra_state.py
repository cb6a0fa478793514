"""Transformer Engine's `_extra_state`, looked at before Transformer Engine unpickles it without restriction.

It is a pickle in a byte tensor (module/base.py `get_extra_state`): the FP8 recipe, scales and counters.
"""

import collections
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.enumerations import enum_member
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.moe.expert_states import EXTRA_STATE

RECIPE_MODULE = "transformer_engine.common.recipe"
# Megatron's subclass of Transformer Engine's recipe: the one that delayed scaling is saved with.
MEGATRON_RECIPE = ("megatron.core.extensions.transformer_engine", "TEDelayedScaling")


def check_extra_states(state: Any, directory: Path) -> None:
    """Refuse a loaded state dict in which an `_extra_state` names more than tensors and FP8 recipes.

    Raises:
        UserError: naming the entry.
    """
    for key, value in _entries(state, ""):
        try:
            _check(value)
        except Exception as error:  # a damaged pickle raises almost anything
            raise UserError(f"{directory}: the object {key} cannot be read: {error}") from None


def _entries(state: Any, path: str):
    if isinstance(state, dict):
        for key, value in state.items():
            if EXTRA_STATE in str(key):
                yield f"{path}{key}", value
            else:
                yield from _entries(value, f"{path}{key}.")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from _entries(value, f"{path}{index}.")


def _check(value: Any) -> None:
    if isinstance(value, io.BytesIO):
        if value.getbuffer().nbytes:
            torch.load(io.BytesIO(value.getvalue()), map_location="cpu", weights_only=True)
    elif isinstance(value, torch.Tensor):
        if value.numel():
            _ExtraStateUnpickler(io.BytesIO(value.detach().cpu().contiguous().numpy().tobytes())).load()
    elif value is not None:
        raise pickle.UnpicklingError(f"a {type(value).__name__} is not expected there")


class _ExtraStateUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("builtins", "getattr"): enum_member,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch.storage", "_load_from_bytes"): _restricted_storage,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if (module, name) == MEGATRON_RECIPE:
            return super().find_class(module, name)
        if module == RECIPE_MODULE and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == RECIPE_MODULE:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _restricted_storage(content: bytes) -> Any:
    """torch.storage `_load_from_bytes` unpickles without restriction."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
