"""Learn merges of token ids by the tokenizers library's trainer, without ever joining a forbidden pair.

A pair of base tokens that stand beside each other in a word of guarded text is forbidden. This is enough for no new
token ever to appear there: a new token begins with a merge of two base tokens, and the base tokenizer's own merges come
first. The trainer knows no forbidden pairs, so the words are cut at them; after each round of merges the words are
written with the new tokens, which opens cuts whose pair is no longer there.
"""

import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megatron_moe_lpr.vocabulary.base_tokenizer import BaseTokenizer
from megatron_moe_lpr.vocabulary.sequences import (
    CUT,
    FIRST_CHARACTER,
    WORD_END,
    character,
    contains,
    insert_before,
    pair_keys,
    read_ids,
    write_ids,
)

ROUNDS = 8
"""Rounds of the trainer for all new tokens."""
CHUNK_CHARACTERS = 1 << 16

Merge = tuple[str, str]


class MergeLearner:
    """Learns new tokens, most useful first.

    Args:
        base: the tokenizer.
        words: words as `sequences.write_ids` writes their ids.
        counts: int64 [words], how often the trainer counts each.
        forbidden: sorted keys (`sequences.pair_keys`) of pairs that must not be joined.
        characters: new tokens of one character each, by the byte ids that they replace.
        min_count: a merge must occur so often.

    Attributes:
        tokens: the new tokens as the vocabulary writes them; the first one has the id `base.rows`.
        pieces: the base ids that each of them replaces.
        merges: the new merges, in order.
    """

    def __init__(
        self,
        base: BaseTokenizer,
        words: Sequence[str],
        counts: np.ndarray,
        forbidden: np.ndarray,
        characters: dict[str, list[int]],
        min_count: int,
    ) -> None:
        self.base, self.counts, self.forbidden, self.min_count = base, counts, forbidden, min_count
        self.tokens: list[str] = list(characters)
        self.pieces: list[list[int]] = list(characters.values())
        self.merges: list[Merge] = []
        self._characters = characters
        self._numbers = {token: base.rows + place for place, token in enumerate(characters)}
        self._words = read_ids("\n".join(words))
        self._ids = self._words
        self._names: dict[str, int] = {}
        self._bytes = np.array(sorted(base.byte_ids), np.int64)

    def learn(self, wanted: int, report: Callable[[int], None]) -> None:
        """Learn until there are `wanted` new tokens or no frequent pair is left; `report` gets each round's number."""
        size = max(1, -(-wanted // ROUNDS))
        while (before := len(self.tokens)) < wanted:
            found = self._train(min(size, wanted - before))
            if not found:
                return
            self._ids = _apply(self._accept(found, wanted), self._ids, self._read_number)
            report(len(self.tokens) - before)

    def forbid(self, keys: np.ndarray) -> None:
        """Forbid further pairs; merges of them go, and all that is built on these."""
        self.forbidden = np.union1d(self.forbidden, keys)
        merges, self.merges = self.merges, []
        self.tokens, self.pieces = list(self._characters), list(self._characters.values())
        self._numbers = {token: self.base.rows + place for place, token in enumerate(self.tokens)}
        names: dict[str, str] = {}
        accepted = []
        for left, right in merges:
            first, second = self._number(left), self._number(right)
            if first is not None and second is not None and self._add(first, second):
                pair = names.get(left, character(first)), names.get(right, character(second))
                names[left + right] = "".join(pair)
                accepted.append(pair)
        self._names = {name: self._numbers[token] for token, name in names.items()}
        self._ids = _apply(accepted, self._words, self._read_number)

    def _train(self, limit: int) -> list[Merge]:
        """Run the library's trainer on the words, cut at forbidden pairs, for at most `limit` tokens."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        ids = self._ids
        cut = np.zeros(len(ids), bool)
        cut[1:] = contains(self.forbidden, pair_keys(ids[:-1], ids[1:]))
        is_byte = contains(self._bytes, ids)  # a token of several byte tokens could not be decoded
        cut[1:] |= (is_byte[1:] | is_byte[:-1]) & (ids[1:] != WORD_END) & (ids[:-1] != WORD_END)
        alphabet = [character(number) for number in np.unique(ids[ids >= 0]).tolist()]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("\n")
        trainer = trainers.BpeTrainer(
            vocab_size=len(alphabet) + limit,
            min_frequency=self.min_count,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet) + 1,
            show_progress=False,
        )
        words = write_ids(insert_before(ids, cut, CUT)).split("\n")
        tokenizer.train_from_iterator(_repeated(words, self.counts), trainer)
        return [_as_pair(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]

    def _accept(self, found: Sequence[Merge], wanted: int) -> list[Merge]:
        """Add the merges that the trainer found; return those that were kept, still in private characters."""
        self._names = {}
        kept = []
        for left, right in found:
            if len(self.tokens) == wanted:
                break
            try:
                first, second = self._read_number(left), self._read_number(right)
            except KeyError:  # built on a merge that was not kept
                continue
            if self._add(first, second):
                self._names[left + right] = self._numbers[self._text(first) + self._text(second)]
                kept.append((left, right))
        return kept

    def _add(self, first: int, second: int) -> bool:
        """Add the merge of two ids, unless it is forbidden; one that makes a base token is forbidden from then on."""
        left, right = self._text(first), self._text(second)
        key = pair_keys(np.array([first]), np.array([second]))
        if contains(self.forbidden, key)[0]:
            return False
        if left + right in self.base.vocabulary:
            # The base tokenizer reaches this token in another way; joined here, old texts would get other old ids.
            self.forbidden = np.union1d(self.forbidden, key)
            return False
        if left + right not in self._numbers:
            self._numbers[left + right] = self.base.rows + len(self.tokens)
            self.tokens.append(left + right)
            self.pieces.append([*self._pieces(first), *self._pieces(second)])
        self.merges.append((left, right))
        return True

    def _read_number(self, name: str) -> int:
        """Return the id of a token in private characters: one of this round, or a single character."""
        return ord(name) - FIRST_CHARACTER if len(name) == 1 else self._names[name]

    def _number(self, token: str) -> int | None:
        return self._numbers.get(token, self.base.vocabulary.get(token))

    def _text(self, number: int) -> str:
        rows = self.base.rows
        return self.tokens[number - rows] if number >= rows else self.base.texts[number]

    def _pieces(self, number: int) -> list[int]:
        rows = self.base.rows
        return self.pieces[number - rows] if number >= rows else [number]


def _repeated(words: Sequence[str], counts: np.ndarray) -> Iterator[str]:
    """Yield each word as often as it counts, if it has two ids without a cut between them."""
    for word, count in zip(words, counts.tolist(), strict=True):
        if len(word) > 1 + 2 * word.count("\t"):
            yield "\n".join([word.replace("\t", "\n")] * count)


def _as_pair(merge: str | list[str]) -> Merge:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _apply(merges: Sequence[Merge], ids: np.ndarray, read_number: Callable[[str], int]) -> np.ndarray:
    """Return `ids` after merges, given in private characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    if not merges:
        return ids
    names = [character(number) for number in np.unique(ids).tolist()]
    names = list(dict.fromkeys([*names, *(left + right for left, right in merges)]))
    numbers = np.array([read_number(name) for name in names], np.int64)
    tokenizer = Tokenizer(models.BPE(vocab={name: place for place, name in enumerate(names)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    encoded = tokenizer.encode_batch_fast(_chunks(write_ids(ids)), add_special_tokens=False)
    return numbers[np.concatenate([np.array(one.ids, np.int64) for one in encoded])]


def _chunks(text: str) -> list[str]:
    """Cut a text before line breaks, into parts that threads encode at the same time."""
    parts, start = [], 0
    while start < len(text):
        end = text.find("\n", start + CHUNK_CHARACTERS)
        end = len(text) if end < 0 else end
        parts.append(text[start:end])
        start = end
    return parts
