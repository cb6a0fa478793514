"""Which entries of a sharded state a checkpoint with only trained weights holds."""

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory


def trained_part(state: dict[str, Any]) -> dict[str, Any]:
    """Of a sharded model state what belongs to parameters that train, and the extra states beside them."""
    return _select(state, lambda entry: isinstance(entry, ShardedObject) or entry.data.requires_grad)


def part_with_keys(state: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Of a sharded model state what a checkpoint with these keys holds."""
    return _select(state, lambda entry: all(key in keys for key in _keys(entry)))


def _select(state: dict[str, Any], wanted) -> dict[str, Any]:
    kinds = (ShardedTensor, ShardedTensorFactory, ShardedObject)
    return {name: entry for name, entry in state.items() if isinstance(entry, kinds) and wanted(entry)}


def _keys(entry: ShardedTensor | ShardedTensorFactory | ShardedObject) -> list[str]:
    if isinstance(entry, ShardedObject):
        return [entry.unique_key]
    if isinstance(entry, ShardedTensor):
        return [entry.key]
    # Cut without the values: on `meta` that costs nothing.
    probe = dataclasses.replace(entry, data=torch.empty(entry.data.shape, device="meta"))
    return [tensor.key for tensor in probe.build()]
