"""Transformer Engine's grouped linear layers, with the FP8 scales of each expert saved and loaded as that expert's.

A grouped layer holds the scales of its experts in one vector, expert by expert: (input, weight, output) of the first,
of the second, and so on (grouped_linear.py `_offsets`). Megatron-Core splits it as if all inputs came first
(extensions/transformer_engine.py `_split_extra_state`): on another number of expert-parallel ranks the scales would be
mixed up. Where weights are in FP8 it also joins the parts too late, in a hook after Transformer Engine has read them.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron

EXTRA_STATE = "_extra_state"
# Per expert three tensors in forward (input, weight, output), two in backward (gradients of output and input).
PER_EXPERT = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")


def split_state(state: dict[str, Any], experts: int) -> list[dict[str, Any]]:
    """Split a grouped layer's state by expert: scales [experts x tensors], histories [steps, experts x tensors]."""
    variables = state["extra_fp8_variables"] | {"num_gemms": 1}
    parts: list[dict[str, Any]] = [
        {"recipe": state["recipe"], "extra_fp8_variables": dict(variables)} for _ in range(experts)
    ]
    for name in state.keys() & set(PER_EXPERT):
        for part, piece in zip(parts, state[name].tensor_split(experts, dim=-1), strict=True):
            part[name] = piece.clone()
    return parts


def merge_states(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the states of single experts to a grouped layer's: the inverse of `split_state`."""
    first = parts[0]
    state = {
        "recipe": first["recipe"],
        "extra_fp8_variables": first["extra_fp8_variables"] | {"num_gemms": len(parts)},
    }
    for name in PER_EXPERT:
        if name in first:
            state[name] = torch.cat([part[name] for part in parts], dim=-1)
    return state


class ExpertStates(torch.nn.Module):
    """Mixin for Megatron's grouped linear layers of Transformer Engine: saves and loads extra state by expert."""

    # Attributes of the grouped linear layer.
    num_gemms: int
    parallel_mode: str | None
    init_fp8_metadata: Callable[..., None]
    _encode_extra_state: Callable[[dict[str, Any]], torch.Tensor]
    _decode_extra_state: Callable[[torch.Tensor], dict[str, Any] | None]
    """Returns None for an empty tensor: without FP8 there is no such state."""

    @override
    def _split_extra_state(self, state: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[misc]
        whole = self._decode_extra_state(state)
        if whole is None:
            return [state] * self.num_gemms
        return [self._encode_extra_state(part) for part in split_state(whole, self.num_gemms)]

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        self._join_extra_states(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _join_extra_states(self, state_dict: dict[str, Any], prefix: str) -> None:
        names = [f"{prefix}{EXTRA_STATE}{index or ''}" for index in range(self.num_gemms)]
        if not all(name in state_dict for name in names):
            return
        self.init_fp8_metadata(num_gemms=self.num_gemms)
        decoded = [self._decode_extra_state(state_dict.pop(name)) for name in names]
        parts = [part for part in decoded if part is not None]
        if len(parts) == len(names):
            state_dict[names[0]] = self._encode_extra_state(merge_states(parts))


@functools.cache
def grouped_linear_layers() -> tuple[type, type]:
    """The column- and row-parallel grouped linear layers; Transformer Engine must be installed."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelGroupedLinear,
        TERowParallelGroupedLinear,
    )

    column = type("TEColumnParallelExperts", (ExpertStates, TEColumnParallelGroupedLinear), {})
    row = type("TERowParallelExperts", (ExpertStates, TERowParallelGroupedLinear), {})
    return overrides_megatron(column), overrides_megatron(row)
