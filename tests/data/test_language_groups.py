"""Which group a language belongs to, from a checkpoint's history."""

import pytest

from megatron_moe_lpr.data.language_groups import group_name, groups_with_prior, learned_languages

DENSE = {"stage": "full", "languages": ["el", "en", "hu", "tr"], "original_languages": ["en"]}
FIRST = [
    DENSE,
    {"stage": "1", "languages": ["el", "hu"], "original_languages": []},
    {"stage": "2", "languages": ["el", "en", "hu"], "original_languages": ["en"]},
]
SECOND = [*FIRST, {"stage": "expansion", "new_experts": [2]}]
TRAINED = [*SECOND, {"stage": "1", "languages": ["el", "tr"], "original_languages": []}]


@pytest.mark.parametrize(
    ("history", "groups"),
    [
        ([], []),
        ([DENSE], []),
        (FIRST, [{"el", "hu"}]),
        (SECOND, [{"el", "hu"}, set()]),
        (TRAINED, [{"el", "hu"}, {"tr"}]),  # el belongs where it was first learned
        ([*FIRST, {"stage": "sft", "languages": ["el", "en", "cs"]}], [{"el", "hu", "cs"}]),
    ],
)
def test_languages_belong_to_the_expansion_that_learned_them(history, groups):
    assert learned_languages(history) == groups


def test_languages_with_a_prior_are_all_but_the_latest():
    assert groups_with_prior(FIRST, ["en"], 2) == [["en"]]
    assert groups_with_prior(SECOND, [], 3) == [["en"], ["el", "hu"]]
    assert groups_with_prior(TRAINED, ["en", "zh"], 3) == [["en", "zh"], ["el", "hu"]]
    third = [*TRAINED, {"stage": "expansion", "new_experts": [1]}]
    assert groups_with_prior(third, [], 4) == [["en"], ["el", "hu"], ["tr"]]


def test_names():
    assert [group_name(group) for group in range(3)] == ["original", "expanded", "expanded 2"]
