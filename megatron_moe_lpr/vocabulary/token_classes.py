"""Where words end in SentencePiece's form, whose tokenizer.json splits no text before the merges.

SentencePiece learns no piece across a space, a change between letters, digits and other characters, or two digits
(`split_by_whitespace`, `split_by_unicode_script`, `split_by_number` and `split_digits` of its trainer).
"""

import unicodedata
from collections.abc import Mapping

import numpy as np

from megatron_moe_lpr.data.sentencepiece_conversion import SPACE

ANY, LETTER, DIGIT, OTHER = range(4)


class TokenClasses:
    """First and last character's class of each token, and whether a token begins with a space.

    Args:
        texts: tokens by id.
        wildcards: ids that may stand beside every class: byte tokens.
    """

    def __init__(self, texts: Mapping[int, str], wildcards: Mapping[int, int]) -> None:
        size = max(texts, default=-1) + 1
        self.begins_with_space = np.zeros(size, bool)
        self.first, self.last = np.zeros(size, np.int8), np.zeros(size, np.int8)
        for number, text in texts.items():
            self.begins_with_space[number] = text.startswith(SPACE)
            letters = text.lstrip(SPACE)
            if letters and number not in wildcards:
                self.first[number], self.last[number] = _class(letters[0]), _class(letters[-1])

    def word_starts(self, ids: np.ndarray) -> np.ndarray:
        """Return for each id [tokens] whether a word starts with it."""
        starts = self.begins_with_space[ids]
        before, after = self.last[ids[:-1]], self.first[ids[1:]]
        differs = (before != after) | (after == DIGIT)
        starts[1:] |= differs & (before != ANY) & (after != ANY)
        return starts


def _class(letter: str) -> int:
    return {"L": LETTER, "M": LETTER, "N": DIGIT}.get(unicodedata.category(letter)[0], OTHER)
