"""Windows of tokens out of datasets, the same number for every language."""

import numpy as np
import torch

from megatron_moe_lpr.data.indexed import open_tokens
from megatron_moe_lpr.data.reading.blend import BlendEntry
from megatron_moe_lpr.errors import UserError


def sample_windows(entries: list[BlendEntry], tokens: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids, int64 [windows, length], by language: windows at equal distances over each language's first dataset.

    Args:
        tokens: of each language, about.
        length: of a window.

    Raises:
        UserError: a dataset that has too few, fewer than two windows, or no positive numbers.
    """
    if length < 2:
        raise UserError(f"--seq-length {length}: must be at least 2")
    count = tokens // length
    if count < 2:
        raise UserError(f"--tokens-per-language {tokens}: at least two windows of --seq-length {length} are needed")
    windows: dict[str, torch.Tensor] = {}
    for entry in entries:
        if entry.language in windows:
            raise UserError(f"--data-path {entry.prefix}: {entry.language} has a dataset already; give one of each")
        if entry.tokens < count * length:
            raise UserError(
                f"--data-path {entry.prefix}: {entry.tokens:,} tokens, {count * length:,} are wanted; "
                "lower --tokens-per-language"
            )
        starts = np.linspace(0, entry.tokens - length, count).astype(np.int64)
        ids = open_tokens(entry.prefix, np.dtype(entry.manifest.dtype))
        parts = [ids[start : start + length].astype(np.int64) for start in starts]
        windows[entry.language] = torch.from_numpy(np.stack(parts))
    return windows
