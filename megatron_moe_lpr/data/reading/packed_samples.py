"""Samples that hold whole documents, and padding behind the last one."""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_moe_lpr.data.indexed import open_loss_mask, open_tokens, read_lengths, read_pointers
from megatron_moe_lpr.data.reading.blend import BlendEntry
from megatron_moe_lpr.data.reading.counted_tokens import without_counted_tokens
from megatron_moe_lpr.data.reading.document_options import DocumentOptions
from megatron_moe_lpr.data.reading.documents import document_keys
from megatron_moe_lpr.data.reading.languages import PADDING_LANGUAGE
from megatron_moe_lpr.data.reading.packing import cut_documents


def packing_notes(entries: Sequence[BlendEntry], sequence_length: int) -> list[str]:
    """Return a note on each dataset, packed best-fit, that has documents longer than a sample."""
    notes = {}
    for entry in entries:
        lengths = read_lengths(entry.prefix)[entry.first_document : entry.end_document]
        cut, tokens = cut_documents(lengths, sequence_length + 1) if entry.is_packed else (0, 0)
        if cut:
            silent = without_counted_tokens(entry, sequence_length) if entry.manifest.chat else 0
            notes[entry.prefix, entry.first_document] = (
                f"{entry.prefix}: {cut:,} of {len(lengths):,} documents are longer than {sequence_length + 1:,} tokens "
                f"(--seq-length and one more) and are cut at their end, {tokens:,} tokens in all"
            ) + (f"; of {silent:,} no answer is left" if silent else "")
    return list(notes.values())


class PackedReader:
    """Makes samples out of documents of one dataset, memory-mapped.

    A sample of `sequence_length` tokens takes documents of one token more: the last token is predicted, and not read.

    Args:
        entry: the dataset.
        language: number of its language.
        sequence_length: tokens of a sample.
        eod: token id to pad with.
        eod_mask_loss: no loss on the prediction of what follows an end of document.
        apart: which keys say where documents begin.
    """

    def __init__(
        self,
        entry: BlendEntry,
        language: int,
        sequence_length: int,
        eod: int,
        eod_mask_loss: bool,
        apart: DocumentOptions,
    ) -> None:
        self.language, self.sequence_length, self.eod = language, sequence_length, eod
        self.eod_mask_loss, self.apart = eod_mask_loss, apart
        self.capacity = sequence_length + 1
        self._tokens = open_tokens(entry.prefix, np.dtype(entry.manifest.dtype))
        self._counted = open_loss_mask(entry.prefix) if entry.manifest.chat else None
        self._lengths, self._pointers = read_lengths(entry.prefix), read_pointers(entry.prefix)
        self._token_bytes = np.dtype(entry.manifest.dtype).itemsize

    def read(self, documents: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Return a sample of whole documents; one that is longer than the sample is cut at its end.

        No token is trained to predict the first one of the next document. A sample without documents is padding alone.

        Returns:
            `tokens`, `labels`, `position_ids`, `language` (int64) and `loss_mask` (float32), each [sequence]; where
            documents are apart also `document` (int32).
        """
        places = [self._place(int(document)) for document in documents]
        text = np.concatenate([self._tokens[place] for place in places] or [self._tokens[:0]]).astype(np.int64)
        counted = self._counted_of(places, len(text))
        # In the sample, not in the dataset.
        begins = np.cumsum([0, *(place.stop - place.start for place in places)])
        counted[begins[:-1]] = 0
        padded = torch.full((self.capacity,), self.eod, dtype=torch.int64)
        padded[: len(text)] = torch.from_numpy(text)
        real = max(len(text) - 1, 0)
        loss_mask = torch.zeros(self.sequence_length)
        loss_mask[:real] = torch.from_numpy(counted[1:])
        tokens, labels = padded[:-1].clone(), padded[1:].clone()
        if self.eod_mask_loss:
            # The first token of a document, which nothing before it tells, has no loss already.
            loss_mask = loss_mask.masked_fill(tokens == self.eod, 0.0)
        is_real = torch.arange(self.sequence_length) < real
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            **document_keys([*begins[1:-1].tolist(), real], self.sequence_length, self.apart),
            "language": torch.where(is_real, self.language, PADDING_LANGUAGE),
        }

    def _place(self, document: int) -> slice:
        """Return where a document's tokens lie in the dataset, those that fit into a sample."""
        begin = int(self._pointers[document]) // self._token_bytes
        return slice(begin, begin + min(int(self._lengths[document]), self.capacity))

    def _counted_of(self, places: Sequence[slice], length: int) -> np.ndarray:
        """Return 1 for each token of a sample's documents that counts in the loss, else 0, float32."""
        if self._counted is None:
            return np.ones(length, np.float32)
        return np.concatenate([self._counted[place] for place in places] or [self._counted[:0]]).astype(np.float32)
