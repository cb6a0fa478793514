"""Characters that SentencePiece's form of BPE writes as byte tokens: the frequent ones become tokens of their own."""

import re
from collections import Counter
from collections.abc import Sequence, Set

import numpy as np

from megatron_moe_lpr.vocabulary.base_tokenizer import BaseTokenizer
from megatron_moe_lpr.vocabulary.sequences import FIRST_CHARACTER, character

COVERAGE = 0.9995
"""Share of the unknown characters in a text that get a token (SentencePiece's `character_coverage`)."""


class ByteRuns:
    """Finds byte tokens in words and replaces those of one character by its own token."""

    def __init__(self, base: BaseTokenizer) -> None:
        self.rows, self.bytes = base.rows, base.byte_ids
        self.numbers = {byte: number for number, byte in base.byte_ids.items()}
        letters = "".join(map(character, base.byte_ids))
        self.pattern = re.compile(f"[{letters}]+") if letters else None

    def choose(self, words: Sequence[str], counts: np.ndarray, guarded: Set[str], limit: int) -> dict[str, list[int]]:
        """Return the characters that become tokens, the one that saves most tokens first, with their byte ids."""
        found: Counter[str] = Counter()
        for word, count in zip(words, counts.tolist(), strict=True):
            for run in self.pattern.findall(word) if self.pattern else ():
                for letter in self._decode(run):
                    found[letter] += count
        allowed = {letter: count for letter, count in found.items() if letter not in guarded and letter != "\ufffd"}
        ordered = sorted(allowed, key=lambda letter: (-allowed[letter] * (len(letter.encode()) - 1), letter))
        chosen: dict[str, list[int]] = {}
        covered, total = 0, sum(allowed.values())
        for letter in ordered[:limit]:
            if covered >= COVERAGE * total or len(letter.encode()) == 1:
                break
            chosen[letter] = [self.numbers[byte] for byte in letter.encode()]
            covered += allowed[letter]
        return chosen

    def replace(self, words: Sequence[str], chosen: Sequence[str]) -> list[str]:
        """Return words with the byte tokens of each chosen character replaced by its new id, in order from `rows`."""
        if self.pattern is None or not chosen:
            return list(words)
        names = {letter: character(self.rows + place) for place, letter in enumerate(chosen)}
        written = {
            "".join(character(self.numbers[byte]) for byte in letter.encode()): names[letter] for letter in chosen
        }
        # Longest first: no character's bytes begin those of another, but a run may hold several characters.
        pattern = re.compile("|".join(sorted(written, key=len, reverse=True)))
        return [pattern.sub(lambda match: written[match[0]], word) for word in words]

    def _decode(self, run: str) -> str:
        return bytes(self.bytes[ord(one) - FIRST_CHARACTER] for one in run).decode("utf-8", "replace")
