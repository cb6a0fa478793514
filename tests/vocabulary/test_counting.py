"""Counts of words and pairs: bounded memory, weights of languages, where words of SentencePiece's kind end."""

from collections import Counter

import numpy as np
import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.vocabulary import corpus, pair_counts
from megatron_moe_lpr.vocabulary.block_counter import CountedBlock
from megatron_moe_lpr.vocabulary.corpus import LanguageText
from megatron_moe_lpr.vocabulary.extension import step_numbers
from megatron_moe_lpr.vocabulary.pair_counts import PairCounts
from megatron_moe_lpr.vocabulary.sequences import CUT, WORD_END, contains, insert_before, pair_keys, read_ids, write_ids
from megatron_moe_lpr.vocabulary.token_classes import TokenClasses
from megatron_moe_lpr.vocabulary.weighting import weigh_words

NOTHING = (np.empty(0, np.int64), np.empty(0, np.int64))


def block(words: dict[str, int]) -> CountedBlock:
    return CountedBlock(Counter(words), NOTHING, NOTHING, set(), [], 1, 100, Counter(), {}, 0)


def test_ids_are_written_as_characters_and_read_back():
    ids = np.array([0, 0xD800, 151_936, 1_048_575, WORD_END, CUT, 3])
    assert read_ids(write_ids(ids)).tolist() == ids.tolist() and len(write_ids(ids)) == len(ids)
    keys = pair_keys(ids[:-1], ids[1:])
    assert len(set(keys[:3].tolist())) == 3 and keys[3:].tolist() == [-1, -1, -1]
    assert contains(np.unique(keys[:2]), keys).tolist() == [True, True, False, False, False, False]
    assert not contains(np.empty(0, np.int64), keys).any()
    assert insert_before(ids, ids == 3, CUT).tolist() == [*ids[:-1].tolist(), CUT, 3]


def test_pairs_are_summed_whatever_the_number_of_blocks(monkeypatch):
    monkeypatch.setattr(pair_counts, "MAX_PENDING", 50)
    random, counts, expected = np.random.default_rng(0), PairCounts(), Counter()
    for _ in range(40):
        keys, numbers = np.unique(random.integers(0, 30, 40), return_counts=True)
        counts.add(keys, numbers)
        expected.update(dict(zip(keys.tolist(), numbers.tolist(), strict=True)))
    for least in (1, 50, 60):
        assert counts.at_least(least).tolist() == sorted(key for key, count in expected.items() if count >= least)
    assert len(PairCounts().at_least(1)) == 0


def test_rare_words_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(corpus, "MAX_WORDS", 100)
    text = LanguageText("el", False)
    for number in range(50):
        text.add(block({"often": 10, f"word {number}": 1, **{f"rare {number} {each}": 1 for each in range(20)}}))
        assert len(text.words) <= 200
    assert text.words["often"] == 500 and text.forgotten >= 2 and text.text_bytes == 5000


def weighed(sizes: dict[str, int], weights: dict[str, float]) -> dict[str, int]:
    """The share of each language's one word, which occurs once in each ten bytes."""
    texts = [LanguageText(name, False, Counter({name: size // 10}), text_bytes=size) for name, size in sizes.items()]
    words, counts, _ = weigh_words(texts, weights)
    return dict(zip(words, (counts / counts.sum()).round(2).tolist(), strict=True))


def test_a_byte_counts_the_same_in_every_language():
    assert weighed({"el": 100_000, "hu": 1000}, {}) == {"el": 0.5, "hu": 0.5}
    assert weighed({"el": 100_000, "hu": 1000}, {"hu": 3}) == {"el": 0.25, "hu": 0.75}


def test_many_rare_words_are_not_all_rounded_away(monkeypatch):
    monkeypatch.setattr("megatron_moe_lpr.vocabulary.weighting.MAX_OCCURRENCES", 1000)
    words = Counter({f"{number}": 1 for number in range(4000)})
    kept, counts, least = weigh_words([LanguageText("el", False, words, text_bytes=10)], {})
    assert len(kept) == 1000 and counts.sum() == 1000 and least == 2


def test_text_without_anything_to_merge():
    with pytest.raises(UserError, match="every word of the text is one token already"):
        weigh_words([LanguageText("el", False, text_bytes=10)], {})


def test_words_of_sentencepiece_end_at_spaces_digits_and_changes_of_kind():
    tokens = ["▁ab", "cd", ".", "1", "2", "▁", "▁▁", "<0xCE>", "é", "a."]
    classes = TokenClasses(dict(enumerate(tokens)), {7: 0xCE})
    places = [0, 1, 7, 8, 2, 3, 4, 5, 1, 6, 0, 9, 2]
    starts = classes.word_starts(np.array(places))
    words = "".join(("|" if start else "") + tokens[place] for place, start in zip(places, starts, strict=True))
    assert words == "|▁abcd<0xCE>é|.|1|2|▁cd|▁▁|▁aba.."


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [(3, [1, 2, 3]), (400, [100, 200, 300, 400]), (2500, [1000, 2000, 2500]), (16_000, [*range(2000, 16_001, 2000)])],
)
def test_numbers_of_tokens_whose_gain_is_shown(tokens, steps):
    assert step_numbers(tokens) == steps
