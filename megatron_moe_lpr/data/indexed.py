"""Read and write Megatron's indexed datasets (.bin: token ids, .idx: document positions) with numpy alone.

Beside the .bin of conversations lies a .loss_mask, a byte for each token: 1 where the token counts in the loss.

megatron-core's builder takes one torch tensor per document and builds the index in a Python loop; this one takes whole
blocks. The bytes are the same (tests/data/test_indexed.py).
"""

import os
import shutil
import struct
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_moe_lpr.data.manifest import bin_path, idx_path, loss_mask_path
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import ChecksumStream

_HEADER = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPE_CODES = {"int32": 4, "uint16": 8}
_LENGTHS_OFFSET = len(_HEADER) + 8 + 1 + 8 + 8
COPY_BYTES = 16 << 20
INDEX_BLOCK = 1 << 20
"""Documents checked at a time."""


class IndexedWriter:
    """Appends documents to a .bin file; `finish` writes the .idx. One document is one sequence.

    Args:
        prefix: path without `.bin` and `.idx`.
        dtype: dtype of token ids, uint16 or int32.
        has_loss_mask: write a .loss_mask too.
    """

    def __init__(self, prefix: str, dtype: np.dtype, has_loss_mask: bool = False) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.lengths: list[np.ndarray] = []
        self.documents = self.tokens = self.loss_tokens = 0
        bin_path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._file = ChecksumStream(open(bin_path(prefix), "wb"))  # noqa: SIM115 (closed by close)
        self._mask = ChecksumStream(open(loss_mask_path(prefix), "wb")) if has_loss_mask else None  # noqa: SIM115

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if self._mask is not None:
            self._mask.close()

    def append(self, tokens: np.ndarray, lengths: np.ndarray, loss_mask: np.ndarray | None = None) -> None:
        """Append documents: `tokens` [sum of lengths] one after the other, `lengths` [documents].

        `loss_mask` [sum of lengths], 1 or 0, is required if the dataset has one.
        """
        self._file.write(tokens.astype(self.dtype, copy=False).data)
        if self._mask is not None:
            assert loss_mask is not None and len(loss_mask) == len(tokens)
            self._mask.write(loss_mask.astype(np.uint8, copy=False).data)
            self.loss_tokens += int(np.count_nonzero(loss_mask))
        self._count(lengths)

    def append_dataset(self, prefix: str) -> None:
        """Append all documents of another dataset of the same dtype."""
        with open(bin_path(prefix), "rb") as source:
            shutil.copyfileobj(source, self._file, COPY_BYTES)
        if self._mask is not None:
            with open(loss_mask_path(prefix), "rb") as source:
                shutil.copyfileobj(source, self._mask, COPY_BYTES)
        self._count(read_lengths(prefix))

    @property
    def checksum(self) -> str:
        """Checksum of the .bin written so far."""
        return self._file.entry().checksum

    @property
    def loss_mask_checksum(self) -> str | None:
        """Checksum of the .loss_mask written so far; None if there is none."""
        return None if self._mask is None else self._mask.entry().checksum

    def finish(self) -> None:
        """Flush the .bin and the .loss_mask to the disk and write the .idx."""
        self._file.close()
        if self._mask is not None:
            self._mask.close()
        lengths = np.concatenate(self.lengths) if self.lengths else np.empty(0, np.int32)
        write_index(idx_path(self.prefix), lengths, self.dtype)

    def _count(self, lengths: np.ndarray) -> None:
        self.lengths.append(lengths.astype(np.int32))
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write an .idx: `lengths` [documents] in tokens."""
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    pointers = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    with open(path, "wb") as file:
        file.write(_HEADER + struct.pack("<QB", _VERSION, _DTYPE_CODES[np.dtype(dtype).name]))
        file.write(struct.pack("<QQ", len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").data)
        file.write(pointers.astype("<i8").data)
        file.write(np.arange(len(lengths) + 1, dtype="<i8").data)
        file.flush()
        os.fsync(file.fileno())


def index_bytes(documents: int) -> int:
    """Return the size in bytes of an .idx for that many documents."""
    return _LENGTHS_OFFSET + documents * (4 + 8) + (documents + 1) * 8


def read_lengths(prefix: str) -> np.ndarray:
    """Return the number of tokens of each document, int32 [documents], memory-mapped.

    Raises:
        UserError: the file is not a valid index.
    """
    path = idx_path(prefix)
    try:
        with open(path, "rb") as file:
            header = file.read(_LENGTHS_OFFSET)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(header) != _LENGTHS_OFFSET or not header.startswith(_HEADER):
        raise UserError(f"{path}: not an index of a Megatron indexed dataset")
    documents = struct.unpack_from("<Q", header, _LENGTHS_OFFSET - 16)[0]
    if path.stat().st_size != index_bytes(documents):
        raise UserError(f"{path}: {path.stat().st_size:,} bytes do not hold the index of {documents:,} documents")
    if not documents:
        return np.empty(0, np.int32)
    return np.memmap(path, dtype="<i4", mode="r", offset=_LENGTHS_OFFSET, shape=(documents,))


def read_pointers(prefix: str) -> np.ndarray:
    """Return the first byte of each document in the .bin, int64 [documents], memory-mapped. Raises UserError."""
    documents = len(read_lengths(prefix))
    if not documents:
        return np.empty(0, np.int64)
    # After an odd number of int32 lengths the int64 positions are unaligned.
    offset = _LENGTHS_OFFSET + 4 * documents
    return np.memmap(idx_path(prefix), dtype="<i8", mode="r", offset=offset, shape=(documents,))


def check_index(prefix: str, dtype: str, tokens: int) -> None:
    """Check every number of an .idx, in blocks, before megatron-core uses its document positions.

    Args:
        prefix: the dataset.
        dtype: dtype of token ids, from the manifest.
        tokens: number of tokens in the .bin.

    Raises:
        UserError: it is not an index of consecutive documents with that many tokens.
    """
    lengths, path = read_lengths(prefix), idx_path(prefix)
    documents = len(lengths)
    with open(path, "rb") as file:
        version, code, _, indices = struct.unpack("<QBQQ", file.read(_LENGTHS_OFFSET)[len(_HEADER) :])
    if (version, code, indices) != (_VERSION, _DTYPE_CODES[dtype], documents + 1):
        raise UserError(f"{path}: not an index of {documents:,} documents of {dtype}; preprocess again")
    # After an odd number of int32 lengths the int64 positions are unaligned.
    pointers = np.memmap(path, dtype="<i8", mode="r", offset=_LENGTHS_OFFSET + 4 * documents)
    end, itemsize = 0, np.dtype(dtype).itemsize
    for start in range(0, documents, INDEX_BLOCK):
        block = lengths[start : start + INDEX_BLOCK].astype(np.int64)
        ends = end + np.cumsum(block)
        places = pointers[start : start + len(block)]
        if block.min() < 0 or not np.array_equal(places, (ends - block) * itemsize):
            raise UserError(f"{path}: damaged: a document's length or place is wrong; copy it or preprocess again")
        end = int(ends[-1])
    for start in range(0, documents + 1, INDEX_BLOCK):
        numbers = pointers[documents + start : documents + min(start + INDEX_BLOCK, documents + 1)]
        if not np.array_equal(numbers, np.arange(start, start + len(numbers))):
            raise UserError(f"{path}: damaged: documents are not one sequence each; copy it or preprocess again")
    if end != tokens:
        raise UserError(f"{path}: documents of {end:,} tokens, and the .bin has {tokens:,}; preprocess again")


def open_tokens(prefix: str, dtype: np.dtype) -> np.ndarray:
    """Return all token ids [tokens] of a .bin, memory-mapped."""
    if not bin_path(prefix).stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(bin_path(prefix), dtype=dtype, mode="r")


def open_loss_mask(prefix: str) -> np.ndarray:
    """Return the loss mask of all tokens of a dataset of conversations, uint8 [tokens], memory-mapped."""
    if not loss_mask_path(prefix).stat().st_size:
        return np.empty(0, np.uint8)
    return np.memmap(loss_mask_path(prefix), dtype=np.uint8, mode="r")


def shuffle_documents(source: str, target: str, dtype: np.dtype, seed: int) -> tuple[str, str | None]:
    """Write the documents of prefix `source` to prefix `target` in a random order.

    The order depends only on `seed` and the number of documents. Needs 20 bytes of memory per document.

    Returns:
        The checksums of the .bin and of the .loss_mask, None where `source` has no loss mask.
    """
    lengths = read_lengths(source)
    # RandomState instead of default_rng: numpy guarantees that its stream never changes.
    order = np.random.RandomState(seed).permutation(len(lengths))
    checksum = _reorder(bin_path(source), bin_path(target), lengths.astype(np.int64) * np.dtype(dtype).itemsize, order)
    mask, shuffled = loss_mask_path(source), loss_mask_path(target)
    mask_checksum = _reorder(mask, shuffled, lengths.astype(np.int64), order) if mask.exists() else None
    write_index(idx_path(target), lengths[order], dtype)
    return checksum, mask_checksum


def _reorder(source: Path, target: Path, sizes: np.ndarray, order: np.ndarray) -> str:
    """Copy the documents of a file, of `sizes` bytes each, in another order; return the checksum of the copy."""
    offsets = np.cumsum(sizes) - sizes
    file = open(target, "wb", buffering=COPY_BYTES)  # noqa: SIM115 (closed by the stream)
    with open(source, "rb") as reader, ChecksumStream(file) as writer:
        descriptor = reader.fileno()
        for document in order:
            writer.write(os.pread(descriptor, sizes[document], offsets[document]))
    return writer.entry().checksum
