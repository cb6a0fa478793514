"""Saves frozen weights bit by bit as the run loaded them.

A model computes with all its weights in one dtype. If the checkpoint stores a frozen weight in another dtype, the model
holds a rounded or widened copy, and a checkpoint of that copy would no longer hold the dense model's own weights.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_moe_lpr.checkpoint.format.chain import TensorReader, open_reader
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory
from megatron_moe_lpr.checkpoint.format.reader import is_model_key
from megatron_moe_lpr.model.configuration.parameter_kinds import kind_of


def frozen_weights(directory: CheckpointDirectory, dtype: torch.dtype) -> "FrozenWeights | None":
    """The frozen weights of a model that was loaded from `directory` and computes in `dtype`; None: no dtype differs.

    Raises:
        UserError: a parent checkpoint is missing, or an index is missing or damaged.
    """
    reader = open_reader(directory)
    # Routers compute in float32, in which they are stored.
    extensions = len(directory.card().new_tokens)
    weights = [key for key in reader.tensors if is_model_key(key) and kind_of(key, (), extensions) != "router"]
    return FrozenWeights(reader) if any(reader.tensors[key].dtype != dtype for key in weights) else None


class FrozenWeights:
    """Puts the stored values of frozen weights into the sharded states of this rank.

    `announce` gives a frozen weight its stored dtype and no values. `fill` then reads the values of those that this
    rank writes, once, and keeps them in host memory: all ranks together hold each such weight once, and none whose
    dtypes agree. The checkpoint is not read again after that.
    """

    def __init__(self, reader: TensorReader) -> None:
        """`reader` reads the checkpoint from which the run loaded its weights."""
        self.reader = reader
        self.values: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def announce(self, state: dict[str, Any]) -> dict[str, Any]:
        """The sharded model state with frozen weights in their stored dtype; without values if that differs."""
        return {name: self._announced(entry) for name, entry in state.items()}

    def _announced(self, entry: Any) -> Any:
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or entry.data.requires_grad:
            return entry
        # A factory splits one parameter into several tensors of the checkpoint: gate and up projection.
        parts = [entry] if isinstance(entry, ShardedTensor) else entry.build()
        announced = [self._without_values(part) for part in parts]
        if all(part.data is not None and part.data.device.type != "meta" for part in announced):
            return entry
        return announced[0] if isinstance(entry, ShardedTensor) else announced

    def _without_values(self, tensor: ShardedTensor) -> ShardedTensor:
        stored = self.reader.tensors.get(tensor.key)
        if stored is None or stored.dtype == tensor.dtype:
            return tensor
        data = torch.empty(tensor.data.shape, dtype=stored.dtype, device="meta")
        return dataclasses.replace(tensor, data=data, dtype=stored.dtype)

    def fill(self, tensors: Iterable[ShardedTensor]) -> None:
        """Give announced tensors their values.

        Raises:
            UserError: a file of the checkpoint is missing or damaged. The remaining tensors then hold arbitrary values,
                so that the collectives of the save can be completed.
        """
        waiting = [tensor for tensor in tensors if tensor.data.device.type == "meta"]
        try:
            for tensor in waiting:
                place = (tensor.key, tuple(tensor.global_offset))
                if place not in self.values:
                    self.values[place] = self._read(tensor)
                tensor.data = self.values[place]
        finally:
            for tensor in waiting:
                if tensor.data.device.type == "meta":
                    tensor.data = torch.empty(tensor.data.shape, dtype=tensor.dtype)

    def _read(self, tensor: ShardedTensor) -> torch.Tensor:
        """The slice of the stored tensor at the offsets of `tensor`; zeros where the vocabulary is padded."""
        whole, values = self.reader.read(tensor.key), torch.zeros(tensor.data.shape, dtype=tensor.dtype)
        offsets = tensor.global_offset[tensor.prepend_axis_num :]
        found = whole[tuple(slice(begin, begin + size) for begin, size in zip(offsets, tensor.data.shape, strict=True))]
        values[tuple(slice(size) for size in found.shape)] = found
        return values
