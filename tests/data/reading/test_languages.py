from megatron_moe_lpr.data.reading.languages import LanguageRegistry


def test_ids_are_sorted_and_deterministic():
    registry = LanguageRegistry(["zh", "el", "en", "el"])
    assert registry.names == ("el", "en", "zh") and [registry.id(name) for name in registry.names] == [0, 1, 2]
    assert LanguageRegistry(["en", "zh", "el"]).names == registry.names


def test_original_ids_are_those_of_the_data():
    registry = LanguageRegistry(["en-US", "el", "pt-PT"])
    assert registry.original_ids(["en", "fr", "pt-BR"]) == {registry.id("en-US")}
    assert registry.group_table([["en"], ["el"]]).tolist() == [1, 0, -1, -1]
