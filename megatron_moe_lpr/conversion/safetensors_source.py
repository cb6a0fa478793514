"""Read safetensors files one tensor at a time; headers first, so that wrong checkpoints are refused before any work."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.card import read_json
from megatron_moe_lpr.checkpoint.reader import TensorInfo
from megatron_moe_lpr.errors import UserError

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
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# Far above the header of any real model; a larger length means that the file is not safetensors.
MAX_HEADER_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class _Place:
    path: Path
    offset: int
    info: TensorInfo


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
            _read_fully(stream, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), place.path)
        return tensor


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory: the single file, or those that the index names.

    Where both are there, transformers reads the single file; so does this.

    Raises:
        UserError: a file that the index names is missing, or there are no safetensors files.
    """
    index = directory / INDEX_FILE
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if index.is_file():
        return _indexed_files(index)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        raise UserError(
            f"{directory}: only pickled weights (.bin) here; they can run code and are not read; rewrite them "
            "as safetensors with transformers: model.save_pretrained(DIR)"
        )
    raise UserError(f"{directory}: neither {INDEX_FILE} nor {SINGLE_FILE} is here")


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map in it")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index.parent / missing[0]}: no such file, but {INDEX_FILE} names it; copy it again")
    return [index.parent / name for name in names]


def _read_header(path: Path) -> dict[str, _Place]:
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise UserError(f"{path}: not a safetensors file, or cut short")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path}: not a safetensors file (its header is not JSON)") from None
    header.pop("__metadata__", None)
    return {name: _place(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _place(path: Path, name: str, entry: Mapping, start: int, file_size: int) -> _Place:
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the header's entry for {name} is not understood ({error!r})") from None
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{path}: the header gives {name} a length that is not the one of its shape")
    if start + end > file_size:
        raise UserError(
            f"{path}: cut short: {name} ends at byte {start + end:,}, the file has {file_size:,}; copy it again"
        )
    return _Place(path, start + begin, TensorInfo(shape, dtype))


def _read_fully(stream: object, target: memoryview, path: Path) -> None:
    done = 0
    while done < len(target):
        # Linux reads at most 2 GiB at once.
        count = stream.readinto(target[done:])
        if not count:
            raise UserError(f"{path}: cut short while it was read")
        done += count
