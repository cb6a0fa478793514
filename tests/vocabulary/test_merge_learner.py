"""Merges by the library's trainer with forbidden pairs, against the rule itself, pair by pair in Python."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_moe_lpr.vocabulary import merge_learner
from megatron_moe_lpr.vocabulary.base_tokenizer import BaseTokenizer
from megatron_moe_lpr.vocabulary.merge_learner import MergeLearner
from megatron_moe_lpr.vocabulary.sequences import pair_keys, write_ids

LETTERS = "abcdefgh"
ROWS = 20


def make_base(*further: str) -> BaseTokenizer:
    """A tokenizer of single letters, and of further tokens that no merge makes."""
    vocabulary = {letter: number for number, letter in enumerate([*LETTERS, *further])}
    return BaseTokenizer(Path("x"), {"model": {"vocab": vocabulary, "merges": []}}, "", ROWS, False, [])


def make_words(seed: int, count: int = 60) -> dict[str, int]:
    random = np.random.default_rng(seed)
    words = ("".join(random.choice(list(LETTERS), random.integers(2, 8))) for _ in range(count))
    return {word: int(random.integers(1, 400)) for word in words}


def make_learner(base: BaseTokenizer, words: dict[str, int], forbidden: set[str], min_count: int = 1) -> MergeLearner:
    ids = [write_ids(np.array([LETTERS.index(letter) for letter in word])) for word in words]
    pairs = np.array([[LETTERS.index(letter) for letter in pair] for pair in sorted(forbidden)]).reshape(-1, 2)
    keys = np.unique(pair_keys(pairs[:, 0], pairs[:, 1]))
    return MergeLearner(base, ids, np.array(list(words.values())), keys, {}, min_count)


def split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    parts = list(word)
    for left, right in merges:
        joined: list[str] = []
        for part in parts:
            if joined and (joined[-1], part) == (left, right):
                joined[-1] = left + right
            else:
                joined.append(part)
        parts = joined
    return parts


def pair_counts(words: dict[str, int], merges: list[tuple[str, str]], forbidden: set[str]) -> Counter:
    counts: Counter = Counter()
    for word, count in words.items():
        parts = split(word, merges)
        for pair in itertools.pairwise(parts):
            if "".join(pair) not in forbidden or max(map(len, pair)) > 1:
                counts[pair] += count
    return counts


@pytest.mark.parametrize("seed", range(4))
def test_each_merge_is_of_the_most_frequent_pair_that_is_allowed(seed, monkeypatch):
    """With a round for each merge the trainer's choice is the rule's."""
    monkeypatch.setattr(merge_learner, "ROUNDS", 1000)
    words = make_words(seed)
    forbidden = {"ab", "ba", "cc", "de", "gh", "ha", "fa"}
    learner = make_learner(make_base(), words, forbidden)
    learner.learn(25, lambda _: None)
    assert len(learner.tokens) == 25
    for place, merge in enumerate(learner.merges):
        counts = pair_counts(words, learner.merges[:place], forbidden)
        assert counts[merge] == max(counts.values())


@pytest.mark.parametrize("seed", range(4))
def test_no_merge_is_of_a_forbidden_pair(seed):
    words, forbidden = make_words(seed), {"ab", "ba", "cc", "de"}
    learner = make_learner(make_base(), words, forbidden)
    learner.learn(40, lambda _: None)
    assert not {left + right for left, right in learner.merges} & forbidden
    assert {
        one: [LETTERS[number] for number in pieces] for one, pieces in zip(learner.tokens, learner.pieces, strict=True)
    } == {one: list(one) for one in learner.tokens}
    known = set(LETTERS)
    for left, right in learner.merges:
        assert {left, right} <= known
        known.add(left + right)


def test_pairs_forbidden_later_go_with_what_is_built_on_them():
    words = {"abcd": 100, "efgh": 50, "abef": 20}
    learner = make_learner(make_base(), words, set())
    learner.learn(6, lambda _: None)
    assert "ab" in learner.tokens and "abcd" in learner.tokens
    learner.forbid(pair_keys(np.array([LETTERS.index("a")]), np.array([LETTERS.index("b")])))
    assert not any(token.startswith("ab") and len(token) == 2 for token in learner.tokens)
    kept = list(learner.tokens)
    learner.learn(6, lambda _: None)
    assert learner.tokens[: len(kept)] == kept and ("a", "b") not in learner.merges and len(learner.tokens) == 6


def test_a_token_of_the_base_is_not_made_in_another_way():
    """Its id would appear where it did not before: a change that no new id shows."""
    learner = make_learner(make_base("abc", "ef"), {"abc": 100, "efg": 90, "abd": 10}, set())
    learner.learn(4, lambda _: None)
    assert not {"abc", "ef"} & {left + right for left, right in learner.merges}
    assert "ab" in learner.tokens and "fg" in learner.tokens


def test_rare_pairs_are_left():
    learner = make_learner(make_base(), {"ab": 5, "cd": 4, "ef": 3}, set(), min_count=4)
    learner.learn(10, lambda _: None)
    assert learner.tokens == ["ab", "cd"]
