"""Whether any token is left that counts in the loss, where only a part of the conversations or documents is read."""

import numpy as np

from megatron_moe_lpr.data.indexed import open_loss_mask, read_lengths, read_pointers
from megatron_moe_lpr.data.reading.blend import BlendEntry
from megatron_moe_lpr.errors import UserError

DOCUMENTS = 1 << 14
"""Documents whose tokens are looked through at a time."""


def check_counted_tokens(entry: BlendEntry, sequence_length: int) -> None:
    """Check that a prediction within the documents that are used counts in the loss; without one there is no loss.

    Of conversations, reads the loss mask up to the first such token. Plain text counts everywhere.

    Raises:
        UserError: none does, because of --split, since packing cuts every conversation before its answer, or since it
            leaves out every document, which have less than 2 tokens.
    """
    if entry.is_packed and read_lengths(entry.prefix)[entry.first_document : entry.end_document].max() < 2:
        raise UserError(f"{entry.prefix}: no document has 2 tokens, of which --pack best-fit could predict one")
    if not entry.manifest.chat or _is_any_counted(entry, sequence_length + 1 if entry.is_packed else None):
        return
    part = ""
    if entry.end_document - entry.first_document < entry.manifest.documents:
        part = f" {entry.first_document:,} to {entry.end_document:,} of {entry.manifest.documents:,}"
    cut = f" in its first {sequence_length + 1:,} tokens (--seq-length and one more)" if entry.is_packed else ""
    raise UserError(f"{entry.prefix}: none of the conversations{part} has a token that counts in the loss{cut}")


def without_counted_tokens(entry: BlendEntry, sequence_length: int) -> int:
    """Return how many of the conversations that are longer than a sample have no counted token left in it."""
    capacity = sequence_length + 1
    lengths = read_lengths(entry.prefix)[entry.first_document : entry.end_document]
    counted, begins = open_loss_mask(entry.prefix), _begins(entry)
    cut = entry.first_document + np.flatnonzero(lengths > capacity)
    return sum(not counted[begins[one] + 1 : begins[one] + capacity].any() for one in cut.tolist())


def _is_any_counted(entry: BlendEntry, capacity: int | None) -> bool:
    lengths, counted, begins = read_lengths(entry.prefix), open_loss_mask(entry.prefix), _begins(entry)
    for first in range(entry.first_document, entry.end_document, DOCUMENTS):
        sizes = lengths[first : min(first + DOCUMENTS, entry.end_document)].astype(np.int64)
        part = counted[begins[first] : begins[first] + int(sizes.sum())] > 0
        if capacity is not None:
            # The first token of a conversation is not predicted, and what lies behind the sample is not read.
            places = np.arange(len(part)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            part &= (places > 0) & (places < capacity)
        if part.any():
            return True
    return False


def _begins(entry: BlendEntry) -> np.ndarray:
    """Return where each document of the dataset begins, in tokens, int64 [documents]."""
    return read_pointers(entry.prefix) // np.dtype(entry.manifest.dtype).itemsize
