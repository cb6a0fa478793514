"""The entries of a sharded state that a checkpoint holds: one with only trained weights, or of other layers' states."""

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory


def trained_part(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a sharded model state that belong to trained parameters, and all extra states."""
    return _select(state, lambda entry: isinstance(entry, ShardedObject) or entry.data.requires_grad)


def part_with_keys(state: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The entries of a sharded model state that a checkpoint with these keys holds."""
    return _select(state, lambda entry: all(key in keys for key in _keys(entry)))


def without_foreign_objects(state: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """A sharded model state without the extra states that a checkpoint with these keys lacks: Transformer Engine's
    layers have them, local ones not. Without FP8 they are empty."""
    return {
        name: entry for name, entry in state.items() if not isinstance(entry, ShardedObject) or entry.unique_key in keys
    }


def _select(state: dict[str, Any], wanted) -> dict[str, Any]:
    kinds = (ShardedTensor, ShardedTensorFactory, ShardedObject)
    return {name: entry for name, entry in state.items() if isinstance(entry, kinds) and wanted(entry)}


def _keys(entry: ShardedTensor | ShardedTensorFactory | ShardedObject) -> list[str]:
    if isinstance(entry, ShardedObject):
        return [entry.unique_key]
    if isinstance(entry, ShardedTensor):
        return [entry.key]
    # The keys do not depend on the values: on the meta device the factory copies nothing.
    probe = dataclasses.replace(entry, data=torch.empty(entry.data.shape, device="meta"))
    return [tensor.key for tensor in probe.build()]
