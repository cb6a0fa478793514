"""Read safetensors files one tensor at a time; headers first, so that wrong checkpoints are refused before any work."""

import dataclasses
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeGuard

import torch

from megatron_moe_lpr.checkpoint.format.reader import TensorInfo
from megatron_moe_lpr.conversion.hugging_face.other_forms import other_weights
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import is_integer, parse_json_object, read_json, shown
from megatron_moe_lpr.files.lfs_pointers import POINTER_START, refuse_lfs_pointer
from megatron_moe_lpr.files.links import file_inside
from megatron_moe_lpr.model.configuration.quantisation import WAY_OUT

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# Far above the header of any real model; a larger length means that the file is not safetensors.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8


@dataclasses.dataclass(frozen=True)
class _Place:
    path: Path
    offset: int
    info: TensorInfo

    @property
    def num_bytes(self) -> int:
        return math.prod(self.info.shape) * self.info.dtype.itemsize


class SafetensorsSource:
    """The tensors of some safetensors files as one set."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read the headers.

        Raises:
            UserError: a file is missing, damaged or cut short, or a tensor lies in two files.
        """
        self._places: dict[str, _Place] = {}
        for path in files:
            for name, place in _read_header(Path(path)).items():
                if name in self._places:
                    raise UserError(f"{path}: {name} also lies in {self._places[name].path.name}; remove one of them")
                self._places[name] = place

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype by name."""
        return {name: place.info for name, place in self._places.items()}

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, for messages."""
        return self._places[name].path

    def read(self, name: str) -> torch.Tensor:
        """One tensor with its stored shape and dtype, in memory of its own."""
        place = self._places[name]
        tensor = torch.empty(place.info.shape, dtype=place.info.dtype)
        with open(place.path, "rb", buffering=0) as stream:
            stream.seek(place.offset)
            _read_fully(stream, tensor.reshape(-1).view(torch.uint8).numpy().data, place.path)
        return tensor


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory: the single file, or those that the index names.

    Where both are there, transformers reads the single file; so does this.

    Raises:
        UserError: a file that the index names is missing, there are no safetensors files, or one is a symbolic link
            that leads out of the directory.
    """
    index = directory / INDEX_FILE
    for path in (directory / SINGLE_FILE, index):
        file_inside(path, directory)
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if index.is_file():
        return _indexed_files(index)
    raise UserError(f"{directory}{other_weights(directory)}")


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map in it")
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise UserError(f"{index}: weight_map must name files of this directory, not {shown(name)}")
    names = sorted(set(weight_map.values()))
    for name in names:
        file_inside(index.parent / name, index.parent)
    missing = [name for name in names if not _is_file(index.parent / name)]
    if missing:
        raise UserError(f"{index.parent / missing[0]}: no such file, but {INDEX_FILE} names it; copy it again")
    return [index.parent / name for name in names]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # for example a name that is too long
        return False


def _read_header(path: Path) -> dict[str, _Place]:
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = path.stat().st_size
            stream.seek(0)
            refuse_lfs_pointer(path, stream.read(len(POINTER_START)))
            stream.seek(8)
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise UserError(f"{path}: not a safetensors file, or cut short")
            data = stream.read(length)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    header = parse_json_object(data, f"{path}: not a safetensors file, its header")
    header.pop("__metadata__", None)
    places = {name: _place(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _refuse_overlaps(path, places)
    return places


def _place(path: Path, name: str, entry: object, start: int, file_size: int) -> _Place:
    fields = entry if isinstance(entry, dict) else {}
    name_of_dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if isinstance(name_of_dtype, str) and name_of_dtype not in DTYPES:
        raise UserError(
            f"{path}: {shown(name, 200)} is stored as {shown(name_of_dtype)}; plain weights in bfloat16, float16 or "
            f"float32 are needed: {WAY_OUT}"
        )
    if (
        not isinstance(name_of_dtype, str)
        or not _are_integers(shape, range(MAX_DIMENSIONS + 1))
        or not _are_integers(offsets, range(2, 3))
    ):
        raise UserError(f"{path}: the header's entry for {shown(name, 200)} is not understood: {shown(entry)}")
    dtype, (begin, end) = DTYPES[name_of_dtype], offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{path}: the header gives {shown(name, 200)} a length that is not the one of its shape")
    if start + end > file_size:
        raise UserError(
            f"{path}: cut short: {shown(name, 200)} ends at byte {start + end:,}, the file has {file_size:,}; "
            "copy it again"
        )
    return _Place(path, start + begin, TensorInfo(tuple(shape), dtype))


def _are_integers(value: object, lengths: range) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) in lengths and all(map(is_integer, value))


def _refuse_overlaps(path: Path, places: Mapping[str, _Place]) -> None:
    """Two tensors in one place would be one tensor that training changes twice; the safetensors library refuses too."""
    end, before = 0, ""
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if place.num_bytes and place.offset < end:
            raise UserError(f"{path}: {shown(name, 200)} lies over {shown(before, 200)}; save the model again")
        end, before = max(end, place.offset + place.num_bytes), name


def _read_fully(stream: io.FileIO, target: memoryview, path: Path) -> None:
    done = 0
    while done < len(target):
        # Linux reads at most 2 GiB at once.
        count = stream.readinto(target[done:])
        if not count:
            raise UserError(f"{path}: cut short while it was read")
        done += count
