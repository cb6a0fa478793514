"""Token ids written as characters, one private character an id, so that the tokenizers library's trainer merges them.

Arrays of ids are int64. The characters begin at U+10000; those of a line break and a tabulator separate words and the
parts of a word.
"""

import numpy as np

FIRST_CHARACTER = 0x10000
MAX_IDS = 0x110000 - FIRST_CHARACTER
"""Ids that have a character."""
WORD_END = ord("\n") - FIRST_CHARACTER
CUT = ord("\t") - FIRST_CHARACTER
"""Separators of words and of a word's parts in arrays of ids; negative, so that no id is meant."""
_PAIR_BASE = 1 << 21


def character(number: int) -> str:
    """Return the private character of an id."""
    return chr(FIRST_CHARACTER + number)


def write_ids(ids: np.ndarray) -> str:
    """Return ids, WORD_END and CUT as characters."""
    return (ids + FIRST_CHARACTER).astype("<u4").tobytes().decode("utf-32-le")


def read_ids(text: str) -> np.ndarray:
    """Return the ids that `write_ids` wrote."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64) - FIRST_CHARACTER


def pair_keys(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return one number for each pair of ids; negative if WORD_END or CUT is one of the two."""
    keys = first * _PAIR_BASE + second
    return np.where((first < 0) | (second < 0), -1, keys)


def contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return for each of `keys` whether it is one of `sorted_keys`."""
    if not len(sorted_keys):
        return np.zeros(len(keys), bool)
    places = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[places] == keys


def insert_before(ids: np.ndarray, mask: np.ndarray, separator: int) -> np.ndarray:
    """Return ids with a separator before each that `mask` marks."""
    return np.insert(ids, np.flatnonzero(mask), separator)
