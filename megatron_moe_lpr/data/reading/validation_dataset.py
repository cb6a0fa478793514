"""Validation samples: each dataset in order, every token predicted exactly once, or whole documents."""

import numpy as np
import torch

from megatron_moe_lpr.data.indexed import open_loss_mask, open_tokens, read_lengths
from megatron_moe_lpr.data.reading.blend import BlendEntry
from megatron_moe_lpr.data.reading.counted_tokens import check_counted_tokens
from megatron_moe_lpr.data.reading.document_options import DocumentOptions
from megatron_moe_lpr.data.reading.documents import document_keys, mask_last_tokens, starts_in_sample
from megatron_moe_lpr.data.reading.languages import PADDING_LANGUAGE
from megatron_moe_lpr.data.reading.packed_samples import PackedReader
from megatron_moe_lpr.data.reading.packing import build_packed_index, cut_documents

NOT_APART = DocumentOptions()


def open_validation_dataset(
    entry: BlendEntry,
    language: int,
    sequence_length: int,
    eod: int,
    eod_mask_loss: bool = False,
    max_samples: int | None = None,
    documents_apart: DocumentOptions = NOT_APART,
) -> "ValidationDataset":
    """Open a validation dataset, packed best-fit or not; arguments as for both classes.

    Args:
        documents_apart: the flags, which packing adds to.

    Raises:
        UserError: conversations without a token that counts in the loss.
    """
    check_counted_tokens(entry, sequence_length)
    kind = PackedValidationDataset if entry.is_packed else ValidationDataset
    apart = documents_apart.apart(entry.is_packed)
    return kind(entry, language, sequence_length, eod, eod_mask_loss, max_samples, apart)


class ValidationDataset(torch.utils.data.Dataset):
    """The tokens of one dataset, cut into consecutive samples, memory-mapped; no shuffling and no repetition.

    The last sample is padded with loss mask 0 and language tag PADDING_LANGUAGE. Indices from `len(dataset)` on return
    samples of padding only, so that every data-parallel rank can run the same number of steps.

    Attributes:
        name: the dataset's prefix.
        language: name of the dataset's language.
        predicted_tokens: tokens with a loss in one pass if `eod_mask_loss` is off.
        text_bytes: UTF-8 bytes of the text, for bits per byte, of conversations those of what counts in the loss; None
            if only a part of it is used.
        documents_apart: which of its documents' masks and positions begin anew.
        bits_of_loss: bits per byte are of the tokens that count in the loss, not of all.
    """

    def __init__(
        self,
        entry: BlendEntry,
        language: int,
        sequence_length: int,
        eod: int,
        eod_mask_loss: bool = False,
        max_samples: int | None = None,
        documents_apart: DocumentOptions = NOT_APART,
    ) -> None:
        """Open a dataset.

        Args:
            max_samples: number of samples to use, from the first; None: all.
            documents_apart: whether its documents see each other.
        """
        self.name, self.language = entry.prefix, entry.language
        self._language, self._eod, self._eod_mask_loss = language, eod, eod_mask_loss
        self.sequence_length = sequence_length
        self.documents_apart = documents_apart
        lengths = read_lengths(entry.prefix)
        self._first_token = int(np.sum(lengths[: entry.first_document], dtype=np.int64))
        predicted = entry.tokens - 1
        self.predicted_tokens = predicted if max_samples is None else min(predicted, max_samples * sequence_length)
        self._end_token = self._first_token + self.predicted_tokens + 1
        self._first_tokens = np.cumsum(lengths, dtype=np.int64) if documents_apart.reset_attention_mask else None
        self._tokens = open_tokens(entry.prefix, np.dtype(entry.manifest.dtype))
        self._counted = open_loss_mask(entry.prefix) if entry.manifest.chat else None
        is_whole = self.predicted_tokens + 1 == entry.manifest.tokens
        self.bits_of_loss = entry.manifest.chat
        self.text_bytes = _text_bytes(entry) if is_whole else None

    def __len__(self) -> int:
        return -(-self.predicted_tokens // self.sequence_length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `tokens`, `labels`, `position_ids`, `language` (int64) and `loss_mask` (float32), each [sequence];
        with --reset-attention-mask also `document` (int32)."""
        start = self._first_token + index * self.sequence_length
        text = self._tokens[start : min(start + self.sequence_length + 1, self._end_token)].astype(np.int64)
        real = max(len(text) - 1, 0)
        padded = torch.full((self.sequence_length + 1,), self._eod, dtype=torch.int64)
        padded[: len(text)] = torch.from_numpy(text)
        is_real = torch.arange(self.sequence_length) < real
        tokens, labels = padded[:-1].clone(), padded[1:].clone()
        loss_mask = is_real.float()
        if self._counted is not None:
            labels_counted = self._counted[start + 1 : start + 1 + real].astype(np.float32)
            loss_mask[:real] = torch.from_numpy(labels_counted)
        if self._eod_mask_loss:
            loss_mask[tokens == self._eod] = 0.0
        starts = self._starts(start, tokens[:real])
        if self._eod_mask_loss:
            loss_mask = mask_last_tokens(loss_mask, starts)
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            **document_keys([*starts, real], self.sequence_length, self.documents_apart),
            "language": torch.where(is_real, self._language, PADDING_LANGUAGE),
        }

    def _starts(self, first: int, tokens: torch.Tensor) -> list[int]:
        """Where documents begin in the sample of `tokens`, from token `first` of the dataset on; empty where they see
        each other."""
        if self._first_tokens is None:
            return []
        within = np.searchsorted(self._first_tokens, (first, first + len(tokens)), side="right")
        eod = self._eod if self._counted is None else None  # it may end each turn of a conversation
        return starts_in_sample(self._first_tokens[slice(*within)] - first, tokens, eod)


class PackedValidationDataset(ValidationDataset):
    """The documents of one dataset, whole, packed best-fit; each once, in an order that no seed changes.

    `predicted_tokens` are the labels within documents, of which alone bits per byte are; `text_bytes` is None if a
    document is cut.
    """

    def __init__(
        self,
        entry: BlendEntry,
        language: int,
        sequence_length: int,
        eod: int,
        eod_mask_loss: bool = False,
        max_samples: int | None = None,
        documents_apart: DocumentOptions = NOT_APART,
    ) -> None:
        """`max_samples`: number of samples to use, from the first; None: all."""
        self.name, self.language = entry.prefix, entry.language
        self.sequence_length = sequence_length
        self.documents_apart = documents_apart
        self._reader = PackedReader(entry, language, sequence_length, eod, eod_mask_loss, documents_apart)
        lengths, capacity = read_lengths(entry.prefix), self._reader.capacity
        documents = np.arange(entry.first_document, entry.end_document, dtype=np.int32)
        self._index = build_packed_index(lengths, documents, capacity, None)
        samples = len(self._index.order)
        self._count = samples if max_samples is None else min(samples, max_samples)
        used = lengths[self._index.documents[: self._index.ends[self._count]]]
        self.predicted_tokens = int((np.minimum(used, capacity) - 1).sum(dtype=np.int64))
        is_whole = self._count == samples and len(used) == entry.manifest.documents
        is_cut = cut_documents(used, capacity)[0] > 0
        self.bits_of_loss = True
        self.text_bytes = _text_bytes(entry) if is_whole and not is_cut else None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a sample, see `PackedReader.read`; of padding alone from `len(dataset)` on."""
        return self._reader.read(self._index.sample(index) if index < self._count else [])


def _text_bytes(entry: BlendEntry) -> int | None:
    """Return the bytes that the bits of a whole dataset are divided by."""
    return entry.manifest.loss_text_bytes if entry.manifest.chat else entry.manifest.text_bytes
