"""Read input files (plain, .gz, .zst, parquet, standard input) as blocks of whole lines; split them into partitions."""

import dataclasses
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_moe_lpr.data.preparation.decompression import Damaged, gzip_chunks, zstd_chunks
from megatron_moe_lpr.errors import UserError

BLOCK_BYTES = 1 << 18
MAX_LINE_BYTES = 64 << 20
"""Longest line allowed by default. Known corpora have no longer document; tokenizing needs about 170 times its size."""
_PARQUET_ROWS = 256
STANDARD_INPUT = "-"
_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".txt", ".txt.gz", ".txt.zst")


@dataclasses.dataclass(frozen=True)
class Block:
    """Some whole lines of one file.

    Attributes:
        source: the file's name.
        lines: the bytes; each line ends in a newline, except possibly the last one of the file.
        line_number: number of the first line, counted from 1 at byte `start_offset` of the file.
        start_offset: where the partition's slice of the file begins.
        plain_text: each line is a document; otherwise it is a JSON object.
        disk_bytes: bytes of the file on disk consumed since the previous block.
        too_long: stands for one line that was longer than allowed; `lines` is empty.
    """

    source: str
    lines: bytes
    line_number: int
    start_offset: int
    plain_text: bool
    disk_bytes: int
    too_long: bool = False


@dataclasses.dataclass(frozen=True)
class Slice:
    """Bytes [start, end) of a file on disk; compressed files and standard input are always read whole."""

    source: str
    start: int
    end: int


def expand_inputs(inputs: Sequence[str], flag: str = "--input") -> list[str]:
    """Return the files of a flag: each glob is replaced by its sorted matches, the order of arguments is kept.

    Raises:
        UserError: a pattern matches nothing, or names a directory, an unknown suffix, or a file twice.
    """
    names: list[str] = []
    for pattern in inputs:
        if pattern == STANDARD_INPUT or Path(pattern).exists():
            names.append(pattern)
            continue
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"{flag} {pattern}: no such file")
        names += matches
    for name in names:
        _check_name(name, names, flag)
    return names


def _check_name(name: str, names: list[str], flag: str) -> None:
    if names.count(name) > 1:
        raise UserError(f"{flag} {name}: given twice")
    if name == STANDARD_INPUT:
        return
    if Path(name).is_dir():
        raise UserError(f"{flag} {name}: is a directory; give its files, for example '{name}/*.jsonl.gz'")
    if not name.endswith((*_SUFFIXES, ".parquet")):
        raise UserError(f"{flag} {name}: unknown suffix; known are {', '.join((*_SUFFIXES, '.parquet'))} and -")


def disk_bytes(name: str) -> int:
    """Return the size of an input file; 0 for standard input."""
    return 0 if name == STANDARD_INPUT else Path(name).stat().st_size


def partition_slices(names: Sequence[str], index: int, count: int) -> list[Slice]:
    """Return the slices of partition `index` (from 1) of `count`: a contiguous range of all inputs, by bytes on disk.

    A line belongs to the partition that contains its first byte; a compressed or parquet file belongs as a whole to the
    partition of its first byte. Partitions 1..count yield every line exactly once, in order.
    """
    if count > 1 and STANDARD_INPUT in names:
        raise UserError("--partitions: standard input can't be partitioned")
    total = sum(disk_bytes(name) for name in names)
    low, high = total * (index - 1) // count, total * index // count
    slices, position = [], 0
    for name in names:
        size = disk_bytes(name)
        start, end = max(low - position, 0), min(high - position, size)
        if count == 1 or (not _is_seekable(name) and low <= position < high):
            slices.append(Slice(name, 0, size))
        elif _is_seekable(name) and start < end:
            slices.append(Slice(name, _line_start(name, start), _line_start(name, end)))
        position += size
    return [piece for piece in slices if piece.source == STANDARD_INPUT or piece.start < piece.end]


def _is_seekable(name: str) -> bool:
    return not name.endswith((".gz", ".zst", ".parquet")) and name != STANDARD_INPUT


def _line_start(name: str, offset: int) -> int:
    """Return the position of the first line that starts at or after `offset`."""
    if offset == 0:
        return 0
    with open(name, "rb") as file:
        file.seek(offset - 1)
        # In chunks: one line may be as long as the file.
        while piece := file.readline(BLOCK_BYTES):
            if piece.endswith(b"\n"):
                break
        return file.tell()


def read_blocks(piece: Slice, columns: Sequence[str], max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Block]:
    """Yield a slice's lines in blocks of about 256 KB; a longer line is a block of its own.

    Args:
        piece: what to read.
        columns: the columns of a parquet file to read (text, language); others are not touched.
        max_line_bytes: a line longer than this becomes a block with `too_long` and is not kept in memory.

    Raises:
        UserError: the file can't be read or is damaged.
    """
    cutter = _Cutter(piece, max_line_bytes)
    for chunk, position in _chunks(piece, columns):
        yield from cutter.cut(chunk, position)
    yield from cutter.finish()


class _Cutter:
    """Regroups chunks of text, which end anywhere, into blocks that end between lines."""

    def __init__(self, piece: Slice, max_line_bytes: int) -> None:
        self.piece, self.max_line_bytes = piece, max_line_bytes
        self.plain_text = ".txt" in Path(piece.source).suffixes
        self.line, self.position, self.reported = 1, piece.start, piece.start
        self.carry: list[bytes] = []
        """Chunks of the incomplete line at the end."""
        self.size = 0
        """Bytes of that line so far, including those dropped because it is too long."""

    def cut(self, chunk: bytes, position: int) -> Iterator[Block]:
        self.position = position
        end = chunk.find(b"\n") + 1
        if self.size + (end or len(chunk)) > self.max_line_bytes + BLOCK_BYTES:
            self.carry = []
        elif not end:
            self.carry.append(chunk)
        if not end:
            self.size += len(chunk)
            return
        if self.size + end > self.max_line_bytes + BLOCK_BYTES:
            yield self._block(b"", too_long=True)
            self.line += 1
            chunk = chunk[end:]
        cut = chunk.rfind(b"\n") + 1
        if lines := b"".join([*self.carry, chunk[:cut]]):
            yield self._block(lines)
            self.line += lines.count(b"\n")
        self.carry, self.size = [chunk[cut:]], len(chunk) - cut

    def finish(self) -> Iterator[Block]:
        """Yield the last line, which may lack a newline."""
        if self.size > self.max_line_bytes + BLOCK_BYTES:
            yield self._block(b"", too_long=True)
        elif rest := b"".join(self.carry):
            yield self._block(rest)

    def _block(self, lines: bytes, too_long: bool = False) -> Block:
        disk, self.reported = self.position - self.reported, self.position
        return Block(self.piece.source, lines, self.line, self.piece.start, self.plain_text, disk, too_long)


def _chunks(piece: Slice, columns: Sequence[str]) -> Iterator[tuple[bytes, int]]:
    """Yield (decompressed bytes, position in the file on disk)."""
    name = piece.source
    try:
        if name == STANDARD_INPUT:
            yield from ((chunk, 0) for chunk in iter(lambda: sys.stdin.buffer.read(BLOCK_BYTES), b""))
        elif name.endswith(".parquet"):
            yield from _parquet_chunks(name, columns)
        else:
            with open(name, "rb") as file:
                yield from _file_chunks(file, piece)
    except Damaged as error:
        raise UserError(f"{name}: damaged or truncated ({error})") from None


def _file_chunks(file: BinaryIO, piece: Slice) -> Iterator[tuple[bytes, int]]:
    if piece.source.endswith(".gz"):
        yield from gzip_chunks(file, BLOCK_BYTES)
    elif piece.source.endswith(".zst"):
        yield from _gathered(zstd_chunks(file))
    else:
        file.seek(piece.start)
        while file.tell() < piece.end:
            yield file.read(min(BLOCK_BYTES, piece.end - file.tell())), file.tell()


def _gathered(chunks: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """Join small chunks to about the size of a block."""
    parts, size, position = [], 0, 0
    for chunk, position in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size >= BLOCK_BYTES:
            yield b"".join(parts), position
            parts, size = [], 0
    if parts:
        yield b"".join(parts), position


def _parquet_chunks(name: str, columns: Sequence[str]) -> Iterator[tuple[bytes, int]]:
    """Yield the rows as JSON lines, so that all later steps handle a single format."""
    _check_columns(name, columns)
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(name)
        # Keep dictionary encoding: a few bytes of a file can repeat one text a thousand times.
        kinds = (pyarrow.string(), pyarrow.large_string())
        texts = [column for column in columns if schema.field(column).type in kinds]
        with pyarrow.parquet.ParquetFile(name, read_dictionary=texts) as file:
            rows, done, size = max(file.metadata.num_rows, 1), 0, disk_bytes(name)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=list(columns)):
                done += batch.num_rows
                yield from _gathered((line, size * done // rows) for line in _row_lines(batch))
    except (pyarrow.ArrowException, OSError) as error:  # pyarrow raises OSError for damage too, without the file name
        raise UserError(f"{name}: not a readable parquet file ({_first_line(error)})") from None


def check_beginning(name: str, columns: Sequence[str]) -> None:
    """Check that the beginning of an input file can be read: its first block, or the schema of a parquet file.

    Raises:
        UserError: the content does not match the suffix, or a column is missing.
        OSError: the file cannot be read.
    """
    if name.endswith(".parquet"):
        _check_columns(name, columns)
    elif name != STANDARD_INPUT:
        next(_chunks(Slice(name, 0, disk_bytes(name)), columns), None)


def parquet_columns(name: str) -> list[str]:
    """Return the names of a parquet file's columns. Raises UserError if it cannot be read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{name}: reading parquet needs pyarrow; pip install pyarrow") from None
    try:
        return pyarrow.parquet.read_schema(name).names
    except (pyarrow.ArrowException, OSError) as error:  # pyarrow raises OSError for damage too, without the file name
        raise UserError(f"{name}: not a readable parquet file ({_first_line(error)})") from None


def _check_columns(name: str, columns: Sequence[str]) -> None:
    present = parquet_columns(name)
    missing = [column for column in columns if column not in present]
    if missing:
        raise UserError(f"{name}: no column {missing[0]!r}; it has {', '.join(present)}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _row_lines(batch: Any) -> Iterator[bytes]:
    """Yield the rows of a pyarrow batch as JSON lines."""
    for row in range(batch.num_rows):
        values = {column: batch.column(column)[row].as_py() for column in batch.schema.names}
        # Values without a JSON form, such as bytes and times, are not text: null.
        yield (json.dumps(values, ensure_ascii=False, default=lambda _: None) + "\n").encode("utf-8", "surrogatepass")


def count_lines(name: str, end: int) -> int:
    """Count newlines before byte `end` of a plain file."""
    lines = 0
    with open(name, "rb") as file:
        while file.tell() < end:
            lines += file.read(min(BLOCK_BYTES, end - file.tell())).count(b"\n")
    return lines
