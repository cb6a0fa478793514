"""Read Megatron's `torch_dist` format one tensor at a time, without building a model."""

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_moe_lpr.checkpoint.untrusted.index_values import build_metadata, is_allowed
from megatron_moe_lpr.checkpoint.untrusted.restricted_pickle import read_pickle
from megatron_moe_lpr.checkpoint.untrusted.torch_files import Window, check_file, no_added_classes
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import is_integer

# Keys of the model's own tensors; optimizer state and the rest of a training checkpoint lie under others.
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")


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
        check_index(self.metadata, self.directory)
        self.entries = {
            key: entry
            for key, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.tensors = {
            key: TensorInfo(tuple(entry.size), entry.properties.dtype) for key, entry in self.entries.items()
        }

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, with its stored shape and dtype. Needs memory for it and for one chunk of it.

        Raises:
            UserError: no such key, or a file that is missing or cut short.
        """
        if key not in self.entries:
            raise UserError(f"{self.directory}: the checkpoint has no tensor {key}")
        entry = self.entries[key]
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
                check_file(Window(stream, place.offset, place.length))
                view = _create_file_view(stream, place.offset, place.length)
                with no_added_classes():
                    # torch made the view for its own load, and says IOBase of it, which is less.
                    tensor = torch.load(view, "cpu", weights_only=True)  # type: ignore[arg-type]
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, but {key} should lie there; copy the checkpoint again") from None
        except Exception as error:  # damaged pickles and archives raise almost anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: {key} cannot be read, the file is damaged or cut short ({reason})") from None
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
            raise UserError(f"{path}: {key} is not a plain tensor")
        if tensor.shape != chunk.sizes or tensor.dtype != self.tensors[key].dtype:
            found, wanted = (list(tensor.shape), tensor.dtype), (list(chunk.sizes), self.tensors[key].dtype)
            raise UserError(
                f"{path}: {key} has shape {found[0]} and dtype {found[1]}, the index says {wanted[0]} and {wanted[1]}"
            )
        return tensor


def check_index(metadata: Metadata, directory: Path) -> None:
    """Check an index against the files beside it, before memory is taken for what it declares. Reads no tensor.

    No file outside of the directory is named in it.

    Raises:
        UserError: sizes that are none, chunks that do not make up their tensor, files missing or cut short.
    """
    sizes: dict[str, int] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise UserError(f"{directory / '.metadata'}: {key!r:.60} is no name of a tensor")
        if isinstance(entry, TensorStorageMetadata):
            try:
                _check_entry(key, entry, metadata, directory, sizes)
            except (AttributeError, TypeError, KeyError, ValueError) as error:
                raise UserError(f"{directory / '.metadata'}: the entry of {key} is damaged ({error!r:.80})") from None
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            try:
                _check_file(directory, place.relative_path, place.offset + place.length, index.fqn, sizes)
            except ValueError as error:
                raise UserError(f"{directory / '.metadata'}: the entry of {index.fqn} is damaged ({error})") from None


def _check_entry(
    key: str, entry: TensorStorageMetadata, metadata: Metadata, directory: Path, sizes: dict[str, int]
) -> None:
    shape, dtype = _numbers(entry.size), entry.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError("no dtype")
    covered = 0
    for chunk in entry.chunks:
        offsets, extent = _numbers(chunk.offsets), _numbers(chunk.sizes)
        ends = (begin + size for begin, size in zip(offsets, extent, strict=True))
        if any(end > size for end, size in zip(ends, shape, strict=True)):
            raise ValueError("a part lies outside of it")
        covered += math.prod(extent)
        place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        begin, length = _numbers((place.offset, place.length))
        _check_file(directory, place.relative_path, begin + length, key, sizes)
        if math.prod(extent) * dtype.itemsize > length:
            raise ValueError(f"{length:,} bytes do not hold a part of shape {list(extent)}")
    if covered != math.prod(shape):
        raise ValueError(f"its parts have {covered:,} values, its shape {list(shape)} has others")


def _check_file(directory: Path, name: object, end: int, key: str, sizes: dict[str, int]) -> None:
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError("its file is not one of this directory")
    path = directory / name
    if name not in sizes:
        if not path.is_file():
            raise UserError(f"{path}: no such file, but {key} should lie there; copy the checkpoint again")
        sizes[name] = path.stat().st_size
    if end > sizes[name]:
        raise UserError(
            f"{path}: cut short: {key} ends at byte {end:,}, the file has {sizes[name]:,}; copy the checkpoint again"
        )


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(is_integer(value) for value in numbers):
        raise ValueError("a size or a place is not a number of bytes or values")
    return numbers


def read_index(path: Path) -> Metadata:
    """Read a `.metadata`, which is a pickle, without doing anything that it asks for.

    Raises:
        UserError: it is missing, damaged, or names what no index of a checkpoint does.
    """
    try:
        content = path.read_bytes()
        return build_metadata(read_pickle(io.BytesIO(content), is_allowed), limit=len(content))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint is incomplete") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path}: not the index of a checkpoint ({error})") from None
