"""Check the token ids of datasets against the vocabulary size of the model."""

from collections.abc import Sequence

import numpy as np

from megatron_moe_lpr.data.indexed import open_tokens
from megatron_moe_lpr.data.manifest import bin_path
from megatron_moe_lpr.data.reading.blend import BlendEntry
from megatron_moe_lpr.errors import UserError

BLOCK_TOKENS = 1 << 24


def check_token_ids(entries: Sequence[BlendEntry], vocab_size: int, model: str) -> None:
    """Refuse datasets with token ids that the model has no embedding for, before a run fails at the first such sample.

    Args:
        entries: the datasets.
        vocab_size: vocabulary size of the model.
        model: checkpoint of the model, for error messages.

    Raises:
        UserError: a dataset has such an id; names both.
    """
    for entry in entries:
        largest = _largest(entry, vocab_size)
        if largest >= vocab_size:
            raise UserError(
                f"{bin_path(entry.prefix)}: holds the token id {largest}, and the vocabulary of {model} has "
                f"{vocab_size:,} ids; preprocess again with that model's tokenizer"
            )


def _largest(entry: BlendEntry, vocab_size: int) -> int:
    manifest = entry.manifest
    if manifest.largest_token is not None:
        return max(manifest.largest_token, manifest.eod)
    # Manifest of an older version: read the tokens only if its tokenizer has more ids than the model.
    if manifest.vocab_size <= vocab_size:
        return manifest.eod
    tokens = open_tokens(entry.prefix, np.dtype(manifest.dtype))
    blocks = range(0, len(tokens), BLOCK_TOKENS)
    return max((int(tokens[start : start + BLOCK_TOKENS].max()) for start in blocks), default=manifest.eod)
