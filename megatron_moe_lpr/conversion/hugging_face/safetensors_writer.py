"""Write safetensors shards in Hugging Face's naming, one tensor at a time."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_moe_lpr.conversion.hugging_face.safetensors_source import DTYPES, INDEX_FILE, SINGLE_FILE
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import write_json

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    directory: Path,
    specs: Sequence[TensorSpec],
    produce: Callable[[TensorSpec], torch.Tensor],
    max_shard_bytes: int,
) -> None:
    """Write `specs` one shard after the other, with an index where there is more than one shard.

    Within a shard the widest dtype comes first and the order is kept otherwise, so that values lie aligned.

    Args:
        directory: an existing directory.
        produce: called once for each spec as it is written; gives a contiguous CPU tensor of that shape and dtype.
        max_shard_bytes: a shard is larger only where a single tensor is.

    Raises:
        UserError: `produce` gave another shape or dtype than announced.
    """
    shards = _split(specs, max_shard_bytes)
    names = _file_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / name, shard, produce)
    if len(shards) > 1:
        weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        total = sum(spec.num_bytes for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(index, directory / INDEX_FILE)


def _write_file(path: Path, specs: Sequence[TensorSpec], produce: Callable[[TensorSpec], torch.Tensor]) -> None:
    with open(path, "wb") as stream:
        stream.write(_header(specs))
        for spec in specs:
            tensor = produce(spec)
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                found = f"{list(tensor.shape)} {tensor.dtype}"
                raise UserError(f"{spec.name}: {found} where {list(spec.shape)} {spec.dtype} was announced")
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def parse_size(text: str) -> int:
    """Bytes of, for example, `5GB`, `500MB` or `2GiB`.

    Raises:
        UserError: not a size.
    """
    number = text.strip().rstrip("BbGgIiKkMm ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * SIZE_UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"--max-shard-size {text}: a size such as 5GB or 500MB is expected") from None
    if size <= 0:
        raise UserError(f"--max-shard-size {text}: must be positive")
    return size


def _split(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return [sorted(shard, key=lambda spec: -spec.dtype.itemsize) for shard in shards]


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def _header(specs: Sequence[TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.num_bytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Readers that map the file into memory want the values at a multiple of 8.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
