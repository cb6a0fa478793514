"""Read Megatron's `torch_dist` format one tensor at a time, without building a model."""

import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_moe_lpr.errors import UserError

# Keys of the model's own tensors; optimizer state and the rest of a training checkpoint lie under others.
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
# All that reading needs of `.metadata`. Whole names only: a module's own imports (`os`, for one) must stay out of
# reach.
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
    "torch": {"Size", "device", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}
# Megatron adds its save plans; what these name becomes a placeholder that does nothing. All else is refused.
UNREAD_MODULES = ("torch.distributed.checkpoint.", "megatron.core.")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def is_model_key(key: str) -> bool:
    """Whether a key of a checkpoint belongs to a weight of the model."""
    return key.startswith(MODEL_PREFIXES) and "_extra_state" not in key


class CheckpointReader:
    """Gives the tensors of an iteration directory by their keys, each assembled from its chunks."""

    def __init__(self, directory: Path) -> None:
        """Read the index.

        Raises:
            UserError: the index is missing, or is not one of a checkpoint.
        """
        self.directory = Path(directory)
        self.metadata = read_index(self.directory / ".metadata")
        self.tensors = {
            key: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for key, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, with its stored shape and dtype. Needs memory for it and for one chunk of it.

        Raises:
            UserError: no such key, or a file that is missing or cut short.
        """
        if key not in self.tensors:
            raise UserError(f"{self.directory}: the checkpoint has no tensor {key}")
        entry = self.metadata.state_dict_metadata[key]
        if len(entry.chunks) == 1:
            return self._read_chunk(key, entry.chunks[0])
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            place = tuple(slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place].copy_(self._read_chunk(key, chunk))
        return whole

    def _read_chunk(self, key: str, chunk: Any) -> torch.Tensor:
        place = self.metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        path = self.directory / place.relative_path
        try:
            with open(path, "rb") as stream:
                tensor = torch.load(_create_file_view(stream, place.offset, place.length), "cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, but {key} should lie there; copy the checkpoint again") from None
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: {key} cannot be read, the file is damaged or cut short ({reason})") from None
        if tensor.shape != chunk.sizes:
            raise UserError(f"{path}: {key} has shape {list(tensor.shape)}, the index says {list(chunk.sizes)}")
        return tensor


class _Placeholder:
    """Takes the place of an object that is not needed; accepts what unpickling does to objects."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED_IN_METADATA.get(module, ()):
            return super().find_class(module, name)
        if module.startswith(UNREAD_MODULES):
            return _Placeholder
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index needs")


def read_index(path: Path) -> Metadata:
    """Read a `.metadata`, which is a pickle, without running anything it may hold.

    Raises:
        UserError: it is missing, damaged, or names what no index of a checkpoint does.
    """
    try:
        content = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint is incomplete") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path}: not the index of a checkpoint ({error})") from None
    if not isinstance(content, Metadata) or content.storage_data is None:
        raise UserError(f"{path}: not the index of a checkpoint")
    return content
