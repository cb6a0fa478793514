"""The documents of a sample: which token belongs to which, and at which position."""

from collections.abc import Iterable

import numpy as np
import torch

from megatron_moe_lpr.data.reading.document_options import DocumentOptions

DOCUMENT = "document"
"""Key of a batch, with --reset-attention-mask: int32 [batch, sequence], number of each token's document inside its
sample, from 0. Padding is a document of its own."""

BOUNDARIES = "cu_seqlens"
"""Key of a batch that has `DOCUMENT`: int32 [documents + 1], where each document of the micro-batch begins in
`tokens.flatten()`, then the number of tokens. Megatron's and Transformer Engine's name."""


def document_keys(starts: Iterable[int], sequence_length: int, options: DocumentOptions) -> dict[str, torch.Tensor]:
    """Return the keys of a sample that say which documents it holds.

    Args:
        starts: index of the first token of each document in the sample, in any order and more than once each if need
            be; those outside of 0 to `sequence_length` - 1 are left out. The first token always begins one. Padding at
            the end begins one too.
        sequence_length: tokens of the sample.
        options: the flags.

    Returns:
        `position_ids` (int64 [sequence]), from 0 in each document with --reset-position-ids, else in the sample; and
        `document` (int32 [sequence]) with --reset-attention-mask.
    """
    positions = torch.arange(sequence_length)
    begins = torch.zeros(sequence_length, dtype=torch.bool)
    begins[[start for start in starts if 0 < start < sequence_length]] = True
    keys = {"position_ids": positions}
    if options.reset_position_ids:
        keys["position_ids"] = positions - torch.where(begins, positions, 0).cummax(0).values
    if options.reset_attention_mask:
        keys[DOCUMENT] = begins.cumsum(0, dtype=torch.int32)
    return keys


def starts_in_sample(boundaries: np.ndarray, tokens: torch.Tensor, eod: int | None) -> list[int]:
    """Return where documents begin in a sample of plain text: at their real beginnings, which --no-append-eod leaves
    unmarked, and after each end of document (EOD), as in Megatron (gpt_dataset.py `_get_ltor_masks_and_position_ids`).

    Args:
        boundaries: indices of the real beginnings.
        tokens: the sample's tokens without padding, int64 [tokens].
        eod: token id of the end of document; None: it may occur inside of documents, as it does in conversations.

    Returns:
        Indices from 1 to the number of tokens, sorted.
    """
    ends = np.empty(0, np.int64) if eod is None else np.flatnonzero(tokens.numpy() == eod)
    starts = np.union1d(boundaries, ends + 1)
    return starts[(starts > 0) & (starts <= len(tokens))].tolist()


def mask_last_tokens(loss_mask: torch.Tensor, starts: Iterable[int]) -> torch.Tensor:
    """Return a sample's loss mask, [sequence], with 0 for each token before the beginning of a document, so that no
    document is trained to predict the next one's first token (--eod-mask-loss)."""
    masked = loss_mask.clone()
    masked[[start - 1 for start in starts]] = 0.0
    return masked


def cumulative_lengths(document: torch.Tensor) -> torch.Tensor:
    """Return `cu_seqlens` of a micro-batch, int32 [documents + 1], from `document`, [batch, sequence] on the host."""
    numbers = document.numpy()
    begins = np.ones(numbers.shape, dtype=bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return torch.from_numpy(np.append(np.flatnonzero(begins), numbers.size).astype(np.int32))
