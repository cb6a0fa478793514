"""How often the trainer counts each word: languages share the new tokens by weights, for each byte of their text."""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.vocabulary.corpus import LanguageText

MAX_OCCURRENCES = 3_000_000
"""Occurrences of all words together that the trainer reads. It takes words one by one, however often they occur."""
MAX_SCALE = 2
"""Times that a small text is counted, so that rounding matters little."""
LEAST_OCCURRENCES = 2
"""A merge must occur so often in the text of some language."""


def weigh_words(texts: Sequence[LanguageText], weights: Mapping[str, float]) -> tuple[list[str], np.ndarray, int]:
    """Return words, int64 counts [words], and the least count of a merge.

    A pair of tokens that occurs once in each thousand bytes counts the same in every language of equal weight, whatever
    the sizes of the texts.

    Raises:
        UserError: no language has a word of two tokens.
    """
    scales = {text.language: weights.get(text.language, 1.0) / text.text_bytes for text in texts}
    sums: dict[str, float] = {}
    for text in texts:
        for word, count in text.words.items():
            sums[word] = sums.get(word, 0.0) + count * scales[text.language]
    occurrences = sum(count for text in texts for count in text.words.values())
    if not sums:
        raise UserError("--learn: every word of the text is one token already; there is nothing to learn")
    scale = min(MAX_OCCURRENCES, MAX_SCALE * occurrences) / sum(sums.values())
    # Rounded sums' differences: of rare words, which all round to nothing one by one, some are kept.
    ends = np.rint(np.cumsum(np.fromiter(sums.values(), float, len(sums))) * scale)
    counts = np.diff(ends, prepend=0).astype(np.int64)
    kept = counts > 0
    words = [word for word, is_kept in zip(sums, kept.tolist(), strict=True) if is_kept]
    least = LEAST_OCCURRENCES * scale * min(scales.values())
    return words, counts[kept], max(LEAST_OCCURRENCES, int(least))
