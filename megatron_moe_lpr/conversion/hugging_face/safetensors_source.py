"""Read safetensors files one tensor at a time; headers first, so that wrong checkpoints are refused before any work."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_moe_lpr.checkpoint.format.reader import TensorInfo
from megatron_moe_lpr.conversion.hugging_face.other_forms import other_weights
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import abbreviated, read_json
from megatron_moe_lpr.files.lfs_pointers import POINTER_START, refuse_lfs_pointer
from megatron_moe_lpr.files.links import file_inside
from megatron_moe_lpr.model.configuration.quantisation import REMEDY

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
"""Dtypes by their names in a header."""


class SafetensorsSource:
    """The tensors of several safetensors files as one set.

    Attributes:
        tensors: shape and dtype of each tensor by its name.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        """Read the headers.

        Raises:
            UserError: a file is missing, damaged or cut short, or a tensor lies in two files.
        """
        self._files: dict[str, Path] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for path in map(Path, files):
            for name, info in _read_header(path).items():
                if name in self._files:
                    raise UserError(f"{path}: {name} also lies in {self._files[name].name}; remove one of them")
                self._files[name], self.tensors[name] = path, info

    def file(self, name: str) -> Path:
        """The file that holds the tensor `name`, for messages."""
        return self._files[name]

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor `name` in its stored shape and dtype, mapped into memory: pages are read when used.

        Raises:
            UserError: the file was removed, cut short or damaged after its header was read.
        """
        # Opened for each tensor: the pages of a file that stays open would all count as this process's memory.
        with _opened(self._files[name]) as file:
            return file.get_tensor(name)


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
            raise UserError(f"{index}: weight_map must name files of this directory, not {abbreviated(name)}")
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


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """Open a file by the safetensors library, which checks that the tensors fill it without a gap or an overlap."""
    try:
        with open(path, "rb") as stream:
            refuse_lfs_pointer(path, stream.read(len(POINTER_START)))
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")[:300]
        raise UserError(
            f"{path}: not a safetensors file, cut short or damaged: {reason}; copy it or save the model again"
        ) from None


def _read_header(path: Path) -> dict[str, TensorInfo]:
    with _opened(path) as file:
        entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return {name: _info(path, name, entry.get_dtype(), entry.get_shape()) for name, entry in entries.items()}


def _info(path: Path, name: str, dtype: str, shape: list[int]) -> TensorInfo:
    if dtype not in DTYPES:
        raise UserError(
            f"{path}: {abbreviated(name, 200)} is stored as {abbreviated(dtype)}; plain weights in bfloat16, float16 "
            f"or float32 are needed: {REMEDY}"
        )
    # torch computes strides of an empty tensor too, and they must fit into 64 bits.
    if math.prod(max(size, 1) for size in shape) >= 2**60:
        raise UserError(
            f"{path}: {abbreviated(name, 200)} has an impossible shape, {str(shape)[:200]}; save the model again"
        )
    return TensorInfo(tuple(shape), DTYPES[dtype])
