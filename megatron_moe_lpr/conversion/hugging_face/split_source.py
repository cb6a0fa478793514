"""A checkpoint's tensors under the names of `model/tensors.py`, where the checkpoint stores several of them as one."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.format.reader import TensorInfo
from megatron_moe_lpr.conversion.hugging_face.safetensors_source import SafetensorsSource
from megatron_moe_lpr.conversion.tensors.fused import StoredTensor
from megatron_moe_lpr.model.configuration.parameters import Shape


class SplitSource(SafetensorsSource):
    """A checkpoint's tensors under the table's names, parts of fused ones included."""

    def __init__(self, source: SafetensorsSource, stored: Iterable[StoredTensor], shapes: Mapping[str, Shape]) -> None:
        """Take the files of `source`, which holds every tensor of `stored` in the shape that `shapes` make up."""
        self._source, self._shapes = source, shapes
        self._stored = {part: tensor for tensor in stored for part in tensor.parts}
        fused = {tensor.name for tensor in self._stored.values()}
        self.tensors = {name: info for name, info in source.tensors.items() if name not in fused}
        for part, tensor in self._stored.items():
            self.tensors[part] = TensorInfo(shapes[part], source.tensors[tensor.name].dtype)

    def file(self, name: str) -> Path:
        """The file that holds the tensor `name`, for messages."""
        return self._source.file(self._stored[name].name if name in self._stored else name)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor `name` in its shape and stored dtype. Raises UserError where the file is damaged."""
        if name not in self._stored:
            return self._source.read(name)
        stored = self._stored[name]
        return stored.split(self._source.read(stored.name), name, self._shapes)
