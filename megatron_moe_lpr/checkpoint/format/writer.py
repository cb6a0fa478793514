"""Write Megatron's `torch_dist` format one tensor at a time.

torch's own FileSystemWriter keeps every tensor of a file alive until the file is closed, so a converter that used it
would need as much memory as the model. The format itself is simple: each .distcp file is a row of `torch.save` blobs,
and `.metadata` is a pickled table of where each one begins.
"""

import contextlib
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import ChecksumStream, FileChecksum, OutputStream

# Several files let many ranks and many disks read at once; each holds at least one tensor.
DEFAULT_FILE_BYTES = 1 << 30
TORCH_DIST_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# What the model passes to `sharded_state_dict(metadata=...)`; it decides the form of the tensor keys.
CONTENT_METADATA = {"singleton_local_shards": True, "non_homogeneous_layers": True}


class CheckpointWriter:
    """Writes whole tensors under their global keys into an iteration directory, in the order they come.

    Use it as a context manager: the index that makes the directory a checkpoint is written on leaving without error.
    """

    def __init__(self, directory: Path, common: Mapping[str, Any], file_bytes: int = DEFAULT_FILE_BYTES) -> None:
        """`common` goes into common.pt, beside the content metadata that Megatron expects there."""
        self.directory, self.common, self.file_bytes = Path(directory), dict(common), file_bytes
        self.tensors: dict[str, STORAGE_TYPES] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}
        self.files: list[Path] = []
        self.checksums: dict[str, FileChecksum] = {}
        """By name, for `integrity.write_manifest`; complete after the block."""
        self.stream: ChecksumStream | None = None

    def __enter__(self) -> "CheckpointWriter":
        self.directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close_stream()
        if error is None:
            self._write_index()

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Append one tensor (any shape, CPU, contiguous, with no storage beyond its own values).

        Raises:
            UserError: the key was written before.
            OSError: the disk is full, or another error of the file system.
        """
        if key in self.tensors:
            raise UserError(f"{key}: written twice")
        stream = self._stream()
        begin = stream.tell()
        _save_tensor(tensor, stream)
        offsets = torch.Size([0] * tensor.dim())
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=tensor.size())
        self.tensors[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.size(), [chunk])
        place = _StorageInfo(self.files[-1].name, begin, stream.tell() - begin)
        self.places[MetadataIndex(key, offsets, 0)] = place

    def _stream(self) -> ChecksumStream:
        if self.stream and self.stream.tell() >= self.file_bytes:
            self._close_stream()
        if not self.stream:
            self.files.append(self.directory / f"__0_{len(self.files)}.distcp")
            self.stream = ChecksumStream(open(self.files[-1], "wb"))  # noqa: SIM115 - closed in __exit__
        return self.stream

    def _close_stream(self) -> None:
        if self.stream:
            self.stream.close()
            self.checksums[self.files[-1].name] = self.stream.entry()
            self.stream = None

    def _write_index(self) -> None:
        metadata = Metadata(self.tensors, None, self.places, StorageMeta(), "1.0.0")
        with self._summed("common.pt") as stream:
            save_blob({**self.common, "content_metadata": CONTENT_METADATA}, stream)
        with self._summed(".metadata") as stream:
            pickle.dump(metadata, stream)
        with self._summed("metadata.json") as stream:
            stream.write(json.dumps(TORCH_DIST_CONFIG).encode())

    @contextlib.contextmanager
    def _summed(self, name: str) -> Iterator[ChecksumStream]:
        with ChecksumStream(open(self.directory / name, "wb")) as stream:
            yield stream
        self.checksums[name] = stream.entry()


def save_blob(content: object, stream: OutputStream) -> None:
    """torch.save to a stream that has no more than torch.save needs."""
    # It is annotated for whole files.
    torch.save(content, stream)  # type: ignore[arg-type]


def _save_tensor(tensor: torch.Tensor, stream: ChecksumStream) -> None:
    try:
        with without_crc():
            save_blob(tensor, stream)
    except Exception:
        if stream.error is not None:
            raise stream.error from None
        raise


@contextlib.contextmanager
def without_crc() -> Iterator[None]:
    """torch.save's CRC32 takes a third of the time of writing, and torch.load does not look at it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
