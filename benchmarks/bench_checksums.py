"""Measure the checksums of checkpoints on one core: verifying a file against only reading it, and writing with and
without. Then the index of a checkpoint, which the restricted unpickler reads, against pickle's own.

The file lies in the page cache, so that the disk is not what is measured. CPU seconds count, not those on the clock:
other programs on the machine do not change them. Runs alternate, the best of each counts.
"""

import dataclasses
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_moe_lpr.checkpoint.format.reader import read_index
from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.checksums import BLOCK_BYTES, ChecksumStream, checksum_of_file


@dataclasses.dataclass
class Flags:
    """Measure the checksums of checkpoints."""

    megabytes: int = 512
    """Size of the file."""
    repeats: int = 5
    """Runs of each."""
    index_tensors: int = 100_000
    """Tensors in the index. With 128 experts in each of 48 layers, weights and optimizer state are some 75,000."""
    directory: Path | None = None
    """Where the file goes. Default: the temporary directory."""


def main() -> None:
    flags = parse_flags(Flags, description=__doc__)
    if flags.megabytes < 1 or flags.repeats < 1:
        raise UserError("--megabytes and --repeats: at least 1")
    size = flags.megabytes * 10**6
    with tempfile.TemporaryDirectory(dir=flags.directory) as directory:
        path, target = Path(directory, "file"), Path(directory, "copy")
        path.write_bytes(os.urandom(size))
        block = os.urandom(BLOCK_BYTES)
        kinds: dict[str, Callable[[], object]] = {
            "reading alone": lambda: read(path),
            "verifying": lambda: checksum_of_file(path),
            "writing alone": lambda: write(target, block, size, with_checksum=False),
            "writing with checksum": lambda: write(target, block, size, with_checksum=True),
        }
        best = dict.fromkeys(kinds, float("inf"))
        for _ in range(flags.repeats):
            for name, action in kinds.items():
                best[name] = min(best[name], cpu_seconds(action))
        index = write_index(Path(directory, ".metadata"), flags.index_tensors)
        restricted = min(cpu_seconds(lambda: read_index(index)) for _ in range(3))
        # Without restriction: the file is the one written two lines above, and the comparison is the point.
        unrestricted = min(cpu_seconds(lambda: pickle.loads(index.read_bytes())) for _ in range(3))
        megabytes = index.stat().st_size / 1e6
    Console().print(table(best, size))
    print(
        f"index of {flags.index_tensors:,} tensors, {megabytes:.0f} MB: {restricted:.2f} s, pickle {unrestricted:.2f} s"
    )


def write_index(path: Path, tensors: int) -> Path:
    """An index as torch writes it, of tensors in one piece each."""
    size = torch.Size([2048, 1024])
    properties = TensorProperties(dtype=torch.bfloat16)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=size)
    entries, places = {}, {}
    for number in range(tensors):
        key = f"decoder.layers.{number // 128}.mlp.experts.experts.{number % 128}.linear_fc1.weight"
        entries[key] = TensorStorageMetadata(properties=properties, size=size, chunks=[chunk])
        places[MetadataIndex(key, chunk.offsets)] = _StorageInfo("__0_0.distcp", number * 4_194_304, 4_194_304)
    path.write_bytes(pickle.dumps(Metadata(state_dict_metadata=entries, storage_data=places)))
    return path


def cpu_seconds(action: Callable[[], object]) -> float:
    """CPU time of one call in this process, system calls included."""
    start = time.process_time()
    action()
    return time.process_time() - start


def read(path: Path) -> None:
    """As `checksum_of_file` does, without the checksum."""
    block = memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while stream.readinto(block):
            pass


def write(path: Path, block: bytes, size: int, with_checksum: bool) -> None:
    """`size` bytes in blocks, as the checkpoint writers do; without fsync, which waits and does not compute."""
    with open(path, "wb", buffering=0) as raw:
        stream = ChecksumStream(raw) if with_checksum else raw
        for _ in range(size // len(block)):
            stream.write(block)


def table(best: dict[str, float], size: int) -> Table:
    """GB/s of a core, and the ratio to the same without a checksum."""
    result = Table("", "GB/s of a core", "of the speed without", title=f"{size / 1e6:,.0f} MB")
    alone = {"verifying": "reading alone", "writing with checksum": "writing alone"}
    for name, seconds in best.items():
        ratio = f"{best[alone[name]] / seconds:.0%}" if name in alone else ""
        result.add_row(name, f"{size / 1e9 / seconds:.2f}", ratio)
    return result


if __name__ == "__main__":
    run_command(main)
