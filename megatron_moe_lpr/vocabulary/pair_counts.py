"""How often each pair of adjacent token ids occurs, for any amount of text."""

import numpy as np

MAX_PENDING = 1 << 22
"""Entries that wait before equal pairs are joined; 16 bytes each."""


class PairCounts:
    """Sums of pairs' counts. Memory grows with the number of different pairs only."""

    def __init__(self) -> None:
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._entries = 0

    def add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        """Add counts [pairs] of the pairs `keys` (`sequences.pair_keys`)."""
        self._pending.append((keys, counts))
        self._entries += len(keys)
        if self._entries > MAX_PENDING:
            self._join()
            # Joined entries stay: wait for as many new ones before joining again.
            self._entries = 0

    def at_least(self, count: int) -> np.ndarray:
        """Return the sorted keys of pairs that occur `count` times or more."""
        keys, counts = self._join()
        return keys[counts >= count]

    def _join(self) -> tuple[np.ndarray, np.ndarray]:
        empty = np.empty(0, np.int64)
        keys = np.concatenate([empty, *(keys for keys, _ in self._pending)])
        counts = np.concatenate([empty, *(counts for _, counts in self._pending)])
        unique, places = np.unique(keys, return_inverse=True)
        sums = np.bincount(places, weights=counts, minlength=len(unique)).astype(np.int64)
        self._pending = [(unique, sums)]
        return unique, sums
