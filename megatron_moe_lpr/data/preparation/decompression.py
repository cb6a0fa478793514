"""Stream decompression of .gz and .zst files in chunks of bounded size, safe against decompression bombs."""

import gzip
import zlib
from collections.abc import Iterator
from typing import BinaryIO

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_WINDOW_BYTES = 1 << 27
"""The limit of the zstd command without --long; frames that need a larger window are refused."""
BLOCKS_AT_ONCE = 4
"""Blocks decompressed at once. One block of four bytes can expand to 128 KB."""
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_SKIP_BYTES = 1 << 20


class Damaged(Exception):
    """The compressed file is damaged or truncated."""


def gzip_chunks(file: BinaryIO, chunk_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Decompress gzip; yield (at most `chunk_bytes` of text, position in the compressed file).

    Raises:
        Damaged: the file is damaged or truncated.
    """
    try:
        with gzip.open(file) as stream:
            yield from ((chunk, file.tell()) for chunk in iter(lambda: stream.read(chunk_bytes), b""))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Damaged(str(error)) from None


def zstd_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Decompress zstd; yield (text of at most `BLOCKS_AT_ONCE` blocks, position in the compressed file).

    zstandard's stream reader accepts truncated files without an error, and its decompressor returns all output of its
    input in one piece, which may be a thousand times larger. Therefore it gets a few blocks at a time.

    Raises:
        Damaged: the file is damaged or truncated, or needs a larger window than `MAX_WINDOW_BYTES`.
    """
    import zstandard

    while magic := file.read(len(ZSTD_MAGIC)):
        if int.from_bytes(magic, "little") in _SKIPPABLE:
            _skip(file, int.from_bytes(_exactly(file, 4), "little"))
            continue
        if magic != ZSTD_MAGIC:
            raise Damaged("no zstd frame")
        frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
        try:
            for piece in _pieces(file, magic):
                yield frame.decompress(piece), file.tell()
        except zstandard.ZstdError as error:
            raise Damaged(str(error)) from None
        if not frame.eof:
            raise Damaged("a zstd frame is incomplete")


def _pieces(file: BinaryIO, magic: bytes) -> Iterator[bytes]:
    """Yield one frame in pieces that end between blocks. Format: RFC 8878, sections 3.1.1.1 and 3.1.1.2."""
    descriptor = _exactly(file, 1)
    flags = descriptor[0]
    single_segment, has_checksum = flags >> 5 & 1, flags >> 2 & 1
    content_size = (single_segment, 2, 4, 8)[flags >> 6]
    header = (not single_segment) + (0, 1, 2, 4)[flags & 3] + content_size
    piece, blocks, is_last = [magic, descriptor, _exactly(file, header)], 0, 0
    while not is_last:
        head = _exactly(file, 3)
        number = int.from_bytes(head, "little")
        is_last, kind, size = number & 1, number >> 1 & 3, number >> 3
        # An RLE block (kind 1) stores its expanded length and then a single byte.
        piece += [head, _exactly(file, 1 if kind == 1 else size)]
        blocks += 1
        if blocks % BLOCKS_AT_ONCE == 0 and not is_last:
            yield b"".join(piece)
            piece = []
    yield b"".join([*piece, _exactly(file, 4 * has_checksum)])


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise Damaged("the last zstd frame is incomplete")
    return data


def _skip(file: BinaryIO, size: int) -> None:
    while size:
        size -= len(_exactly(file, min(size, _SKIP_BYTES)))
