"""Causal attention within each document of a flattened micro-batch, by PyTorch's own kernel and without a mask."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

WINDOW_ROWS = 512
"""Queries that share a mask where there is a sliding window."""


def attend_within_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Attend within each document, those of equal length together.

    Args:
        query, key, value: [tokens, heads, head dimension], the documents one after the other.
        lengths: tokens of each document.
        window: positions before a token that it sees, the token itself not counted; None: all of its document.
        scale: factor of the scores.

    Returns:
        [tokens, heads, head dimension].
    """
    # `split` and not slices: backward of a slice fills a tensor of all tokens with zeros.
    parts = tuple(zip(*(tensor.split(list(lengths)) for tensor in (query, key, value)), strict=True))
    alike: dict[int, list[int]] = defaultdict(list)
    for number, length in enumerate(lengths):
        alike[length].append(number)
    outputs: list[torch.Tensor] = [query] * len(parts)
    for length, numbers in alike.items():
        q, k, v = (torch.stack([parts[one][which] for one in numbers]).transpose(1, 2) for which in range(3))
        if window is None or length <= window + 1:
            context = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            context = _attend_in_window(q, k, v, window, scale)
        for number, output in zip(numbers, context.transpose(1, 2).unbind(), strict=True):
            outputs[number] = output
    return torch.cat(outputs)


class Piece(NamedTuple):
    """Consecutive tokens of one document."""

    document: int
    """Number of the document."""
    tokens: int
    seen: int
    """Tokens of the document up to the last of these."""


def split_at_documents(spans: Sequence[tuple[int, int]], lengths: Sequence[int]) -> Iterator[Piece]:
    """Cut spans of tokens where documents begin.

    Args:
        spans: begin and end of each, in the flattened micro-batch.
        lengths: tokens of each document.
    """
    ends = list(accumulate(lengths))
    for begin, end in spans:
        while begin < end:
            document = bisect_right(ends, begin)
            last = min(end, ends[document])
            yield Piece(document, last - begin, last - (ends[document] - lengths[document]))
            begin = last


def _attend_in_window(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float
) -> torch.Tensor:
    """Attend to the position itself and the `window` before it, in blocks of rows, whose masks have no column that none
    of their rows sees. [batch, heads, sequence, head dimension] each."""
    outputs, end = [], 0
    for rows in query.split(WINDOW_ROWS, dim=2):
        start, end = end, end + rows.shape[2]
        first = max(0, start - window)
        positions = torch.arange(first, end, device=query.device)
        distance = positions[start - first :, None] - positions
        mask = (distance >= 0) & (distance <= window)
        keys, values = key[:, :, first:end], value[:, :, first:end]
        outputs.append(scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale))
    return torch.cat(outputs, dim=2)
