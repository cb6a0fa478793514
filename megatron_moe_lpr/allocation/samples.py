"""Samples of datasets: windows of tokens, the same number for every language."""

import numpy as np
import torch

from megatron_moe_lpr.data.indexed import open_tokens
from megatron_moe_lpr.data.reading.blend import BlendEntry
from megatron_moe_lpr.errors import UserError


def sample_windows(
    entries: list[BlendEntry],
    tokens: int,
    length: int,
    flag: str = "--data-path",
    tokens_flag: str = "--tokens-per-language",
) -> dict[str, torch.Tensor]:
    """Sample windows at equal distances from the dataset of each language: token ids, int64 [windows, length].

    Args:
        entries: one dataset for each language.
        tokens: tokens of each language, rounded down to whole windows.
        length: tokens of a window.
        flag, tokens_flag: names of the flags that gave datasets and tokens, for messages.

    Raises:
        UserError: two datasets of a language, too few tokens in one, or numbers that give fewer than two windows.
    """
    if length < 2:
        raise UserError(f"--seq-length {length}: must be at least 2")
    count = tokens // length
    if count < 2:
        raise UserError(f"{tokens_flag} {tokens}: at least two windows of --seq-length {length} are needed")
    windows: dict[str, torch.Tensor] = {}
    for entry in entries:
        if entry.language in windows:
            raise UserError(f"{flag} {entry.prefix}: {entry.language} has a dataset already; give one of each")
        if entry.tokens < count * length:
            raise UserError(
                f"{flag} {entry.prefix}: {entry.tokens:,} tokens, {count * length:,} are wanted; lower {tokens_flag}"
            )
        starts = np.linspace(0, entry.tokens - length, count).astype(np.int64)
        ids = open_tokens(entry.prefix, np.dtype(entry.manifest.dtype))
        parts = [ids[start : start + length].astype(np.int64) for start in starts]
        windows[entry.language] = torch.from_numpy(np.stack(parts))
    return windows
