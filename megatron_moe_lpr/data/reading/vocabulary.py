"""Token ids of datasets against the vocabulary of the model that is to read them."""

from collections.abc import Sequence

import numpy as np

from megatron_moe_lpr.data.indexed import open_tokens
from megatron_moe_lpr.data.manifest import bin_path
from megatron_moe_lpr.data.reading.blend import BlendEntry
from megatron_moe_lpr.errors import UserError

BLOCK_TOKENS = 1 << 24


def check_token_ids(entries: Sequence[BlendEntry], vocab_size: int, model: str) -> None:
    """Refuse a dataset with an id that the model has no embedding for; found when drawn, it would end a run late.

    Args:
        entries: the datasets.
        vocab_size: of the model.
        model: its checkpoint, for messages.

    Raises:
        UserError: naming the dataset and the id.
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
    # An older version wrote it. Only where its tokenizer has more ids than the model must the text be looked at.
    if manifest.vocab_size <= vocab_size:
        return manifest.eod
    tokens = open_tokens(entry.prefix, np.dtype(manifest.dtype))
    blocks = range(0, len(tokens), BLOCK_TOKENS)
    return max((int(tokens[start : start + BLOCK_TOKENS].max()) for start in blocks), default=manifest.eod)
