import pytest
import torch

from megatron_moe_lpr.data.reading.languages import PADDING_LANGUAGE, LanguageRegistry
from megatron_moe_lpr.errors import UserError


def test_ids_are_sorted_and_deterministic():
    registry = LanguageRegistry(["zh", "el", "en", "el"])
    assert registry.names == ("el", "en", "zh") and [registry.id(name) for name in registry.names] == [0, 1, 2]
    assert LanguageRegistry(["en", "zh", "el"]).names == registry.names
    assert [registry.name(number) for number in (0, 2, PADDING_LANGUAGE)] == ["el", "zh", "padding"]


def test_original_table_says_which_tokens_are_original():
    registry = LanguageRegistry(["zh", "el", "en"])
    language = torch.tensor([[0, 1, 1], [2, 2, PADDING_LANGUAGE]])
    assert registry.original_table(["en", "zh"])[language].tolist() == [[False, True, True], [True, True, False]]
    assert not registry.original_table([])[language].any()


def test_unknown_original_language_lists_what_there_is():
    with pytest.raises(UserError, match=r"^--original-languages fr de: not in the data, which has el, en; add a"):
        LanguageRegistry(["en", "el"]).original_ids(["en", "fr", "de"])
