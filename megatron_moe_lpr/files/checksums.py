"""Checksums of files: xxh3_128 computed while a file is written or read, and SHA-256."""

import dataclasses
import hashlib
import io
import os
from pathlib import Path
from typing import IO, Any, Protocol

import xxhash

from megatron_moe_lpr.errors import name_file_in_oserror
from megatron_moe_lpr.liveness import advance

BLOCK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class FileChecksum:
    """Size and checksum of a file."""

    bytes: int
    """Size of the file."""
    checksum: str
    """xxh3_128 of the content, 32 hexadecimal digits."""


class OutputStream(Protocol):
    """The methods of a binary stream that torch.save and its zip writer call."""

    def write(self, block: Any) -> int: ...

    def tell(self) -> int: ...

    def flush(self) -> None: ...


class ChecksumStream:
    """A binary stream for writing that computes the checksum of what is written.

    Append only: torch.save, its zip writer and the checkpoint writers of torch and Megatron call `write`, `tell` and
    `flush`. `seek` to anywhere but the end raises, since the checksum would become wrong. An OSError of a write is kept
    in `error`: torch.save replaces it by a RuntimeError that does not contain the reason.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        """Wrap a stream that is at its beginning."""
        self.raw = raw
        self.error: OSError | None = None
        self._bytes = 0
        self._digest = xxhash.xxh3_128()

    def write(self, block: Any) -> int:
        """Write a whole bytes-like object."""
        view = memoryview(block).cast("B")
        try:
            self.raw.write(view)
        except OSError as error:
            self.error = error
            raise
        self._digest.update(view)
        self._bytes += view.nbytes
        advance()
        return view.nbytes

    def tell(self) -> int:
        """Bytes written so far."""
        return self._bytes

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Accept a seek to the end, where the stream is already.

        Raises:
            io.UnsupportedOperation: the target is not the end.
        """
        target = {os.SEEK_SET: 0, os.SEEK_CUR: self._bytes, os.SEEK_END: self._bytes}[whence] + offset
        if target != self._bytes:
            raise io.UnsupportedOperation("a stream with a checksum cannot go back")
        return target

    def flush(self) -> None:
        """Hand buffered bytes to the operating system."""
        self.raw.flush()

    def fileno(self) -> int:
        """The file's descriptor, for fsync."""
        return self.raw.fileno()

    def close(self) -> None:
        """Flush, wait until the content is on the disk (fsync), and close."""
        if not self.raw.closed:
            try:
                self.raw.flush()
                os.fsync(self.raw.fileno())
            finally:
                self.raw.close()

    def entry(self) -> FileChecksum:
        """Size and checksum of what was written so far."""
        return FileChecksum(self._bytes, self._digest.hexdigest())

    def __enter__(self) -> "ChecksumStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def checksum_of_file(path: Path) -> FileChecksum:
    """Read a file in blocks and return its size and xxh3_128. Several GB/s where the file is cached in memory."""
    digest, size = xxhash.xxh3_128(), 0
    block = memoryview(bytearray(BLOCK_BYTES))
    with name_file_in_oserror(path), open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            size += count
            advance()
    return FileChecksum(size, digest.hexdigest())


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(16 << 20), b""):
            digest.update(chunk)
            advance()
    return digest.hexdigest()
