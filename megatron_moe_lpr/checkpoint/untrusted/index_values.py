"""The index of a checkpoint, made anew from what its pickle describes: only checked names, numbers and dtypes enter."""

import pickle
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_moe_lpr.checkpoint.untrusted.enumerations import GETATTR, enum_member
from megatron_moe_lpr.checkpoint.untrusted.restricted_pickle import Call, Name, whole_number

DTYPES = {Name("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# All that reading needs of `.metadata`. Whole names only.
ALLOWED_IN_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", *(name.name for name in DTYPES)},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
    GETATTR.module: {GETATTR.name},
}
# Megatron adds its save plans, which are not read. All else is refused.
UNREAD_MODULES = ("torch.distributed.checkpoint.", "megatron.core.")
MEMORY_FORMATS = {
    _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT: torch.contiguous_format,
    _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST: torch.channels_last,
    _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT: torch.preserve_format,
}
Kind = TypeVar("Kind")


def is_allowed(module: str, name: str) -> bool:
    """Whether a name may stand in an index."""
    return name in ALLOWED_IN_METADATA.get(module, ()) or module.startswith(UNREAD_MODULES)


def build_metadata(content: Any, limit: int) -> Metadata:
    """The index out of what `read_pickle` returned of it; save plans and the writer's own notes are left out.

    Args:
        limit: chunks to take at most. A pickle of n bytes cannot hold more than n that are not shared, and shared lists
            of chunks could make a small file take hours.

    Raises:
        pickle.UnpicklingError: it is not one, or holds a value that none has.
    """
    return _Builder(limit).metadata(content)


class _Builder:
    """Objects that the pickle shares, the size of many tensors for one, are made once."""

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.sizes: dict[int, torch.Size] = {}
        self.properties: dict[int, TensorProperties] = {}
        self.chunks: dict[int, ChunkStorageMetadata] = {}

    def metadata(self, content: Any) -> Metadata:
        fields = _state(content, Metadata)
        entries, places = _table(fields, "state_dict_metadata"), _table(fields, "storage_data")
        return Metadata(
            state_dict_metadata={_text(key): self.entry(entry) for key, entry in entries.items()},
            storage_data={self.place(key): self.storage(info) for key, info in places.items()},
        )

    def entry(self, found: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if _is_call(found, BytesStorageMetadata):
            return BytesStorageMetadata()
        fields = _state(found, TensorStorageMetadata)
        chunks = fields.get("chunks")
        if type(chunks) is not list or len(chunks) > self.left:
            raise pickle.UnpicklingError("a tensor's chunks are no list, or too many for the size of the file")
        self.left -= len(chunks)
        return TensorStorageMetadata(
            properties=self._once(self.properties, fields.get("properties"), _properties),
            size=self.size(fields.get("size")),
            chunks=[self._once(self.chunks, chunk, self.chunk) for chunk in chunks],
        )

    def chunk(self, found: Any) -> ChunkStorageMetadata:
        fields = _state(found, ChunkStorageMetadata)
        return ChunkStorageMetadata(self.size(fields.get("offsets")), self.size(fields.get("sizes")))

    def size(self, found: Any) -> torch.Size:
        return self._once(self.sizes, found, _size)

    def place(self, found: Any) -> MetadataIndex:
        fields = _state(found, MetadataIndex)
        offset, index = fields.get("offset"), fields.get("index")
        return MetadataIndex(
            _text(fields.get("fqn")),
            None if offset is None else self.size(offset),
            None if index is None else whole_number(index),
        )

    def storage(self, found: Any) -> _StorageInfo:
        fields = _state(found, _StorageInfo)
        if fields.get("transform_descriptors"):
            raise pickle.UnpicklingError("a tensor is compressed, which none of a checkpoint is")
        return _StorageInfo(
            _text(fields.get("relative_path")), whole_number(fields.get("offset")), whole_number(fields.get("length"))
        )

    def _once(self, known: dict[int, Kind], found: Any, build: Any) -> Kind:
        # By identity: the descriptions live as long as this builder does.
        value = known.get(id(found))
        if value is None:
            value = known[id(found)] = build(found)
        return value


def _size(found: Any) -> torch.Size:
    values = found.arguments if type(found) is Call and found.function == ("torch", "Size") else ()
    if len(values) != 1 or type(values[0]) not in (tuple, list):
        raise pickle.UnpicklingError("a size or a place is none")
    return torch.Size([whole_number(value) for value in values[0]])


def _properties(found: Any) -> TensorProperties:
    state = found.state if _is_call(found, TensorProperties) else None
    if type(state) is not tuple or len(state) != 5:
        raise pickle.UnpicklingError("a tensor's properties are none")
    dtype, layout, requires_grad, memory_format, pin_memory = state
    if type(dtype) is not Name or dtype not in DTYPES:
        raise pickle.UnpicklingError("a tensor's dtype is none")
    if type(layout) is not Call or layout.function != ("torch.serialization", "_get_layout"):
        raise pickle.UnpicklingError("a tensor's layout is none")
    if len(layout.arguments) != 1 or type(layout.arguments[0]) is not str or layout.arguments[0] != "torch.strided":
        raise pickle.UnpicklingError("a tensor is not dense")
    if type(requires_grad) is not bool or type(pin_memory) is not bool:
        raise pickle.UnpicklingError("a tensor's properties are none")
    encoding = enum_member(memory_format, _MEM_FORMAT_ENCODING)
    return TensorProperties(DTYPES[dtype], torch.strided, requires_grad, MEMORY_FORMATS[encoding], pin_memory)


def _state(found: Any, kind: type) -> dict[str, Any]:
    if not _is_call(found, kind) or found.arguments or type(found.state) is not dict:
        raise pickle.UnpicklingError(f"a {kind.__name__} is expected and is not there")
    return found.state


def _is_call(found: Any, kind: type) -> bool:
    return type(found) is Call and found.is_new and found.function == (kind.__module__, kind.__name__)


def _table(fields: dict[str, Any], name: str) -> dict[Any, Any]:
    if type(fields.get(name)) is not dict:
        raise pickle.UnpicklingError(f"it has no table {name}")
    return fields[name]


def _text(found: Any) -> str:
    if type(found) is not str:
        raise pickle.UnpicklingError("a name is none")
    return found
