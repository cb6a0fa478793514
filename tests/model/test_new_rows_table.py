"""Names, kinds and slices of rows that vocabulary extensions add, against tables written by hand."""

import dataclasses

import pytest

from megatron_moe_lpr.model.build import padded_new_tokens
from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind, kind_of
from megatron_moe_lpr.model.configuration.parameters import describe_model
from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, is_vocabulary_key, model_rows
from tests.conversion.tiny_models import COMMON

ARCHITECTURE = read_architecture(COMMON | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
TIED = dataclasses.replace(ARCHITECTURE, tied_embeddings=True)
UNTIED = dataclasses.replace(ARCHITECTURE, tied_embeddings=False)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def outer(architecture, **given):
    layers = architecture.num_layers
    return [row for row in model_rows(architecture, [3] * layers, DENSE_LAYOUT, **given) if row.layer is None]


def test_rows_are_slices_of_one_matrix():
    """Base rows 0 to 98, then 10 of the first extension and 7 of the second, of input and output alike."""
    found = [(row.key, row.names, row.rows, row.kind, row.dense_names) for row in outer(UNTIED, new_tokens=(10, 7))]
    kinds = (ParameterKind.EMBEDDING, ParameterKind.EARLIER_ROWS, ParameterKind.NEW_ROWS)
    slices = ((0, 99), (99, 109), (109, 116))
    embedding = ("word_embeddings.weight", "new_word_embeddings.0.weight", "new_word_embeddings.1.weight")
    output = ("weight", "new_rows.0.weight", "new_rows.1.weight")
    expected = [
        *((f"embedding.{key}", (EMBEDDING,), *rest) for key, *rest in zip(embedding, slices, kinds, strict=True)),
        *((f"output_layer.{key}", (OUTPUT,), *rest) for key, *rest in zip(output, slices, kinds, strict=True)),
    ]
    dense = {"embedding.word_embeddings.weight": (EMBEDDING,), "output_layer.weight": (OUTPUT,)}
    expected = [(key, names, rows, kind, dense.get(key, ())) for key, names, rows, kind in expected]
    norm = ("decoder.final_layernorm.weight", ("model.norm.weight",), None, ParameterKind.NORM, ("model.norm.weight",))
    assert found == [*expected[:3], norm, *expected[3:]]
    assert [row.key for row in outer(TIED, new_tokens=(10, 7))] == [key for key, *_ in expected[:3]] + [norm[0]]


def test_without_new_tokens_nothing_is_a_slice():
    assert all(row.rows is None for row in outer(UNTIED))


def test_kinds_by_name():
    for number, kind in ((0, "earlier vocabulary rows"), (1, "new vocabulary rows")):
        assert kind_of(f"module.embedding.new_word_embeddings.{number}.weight", extensions=2) == kind
        assert kind_of(f"output_layer.new_rows.{number}.weight", extensions=2) == kind
    assert kind_of("output_layer.new_rows.0.weight") == "new vocabulary rows"
    assert kind_of("output_layer.weight", extensions=2) == "embedding"
    with pytest.raises(ValueError, match="another vocabulary extension"):
        kind_of("output_layer.new_rows.1.weight")


def test_kinds_agree_with_the_description():
    for parameter in describe_model(UNTIED, [3] * UNTIED.num_layers, new_tokens=(5, 6, 7)):
        if parameter.layer is None:
            assert kind_of(parameter.name, extensions=3) is parameter.kind
            assert is_vocabulary_key(parameter.name) == (parameter.kind is not ParameterKind.NORM)


def test_an_extension_of_no_rows_freezes_those_before_it():
    assert [(row.key, row.kind) for row in outer(TIED, new_tokens=(10, 0))][1:-1] == [
        ("embedding.new_word_embeddings.0.weight", ParameterKind.EARLIER_ROWS)
    ]
    assert kind_of("embedding.new_word_embeddings.0.weight", extensions=2) is ParameterKind.EARLIER_ROWS


@pytest.mark.parametrize(("rows", "ranks", "padded"), [(1, 1, 8), (8, 1, 8), (9, 2, 16), (17, 2, 32), (4000, 4, 4000)])
def test_padding(rows, ranks, padded):
    assert padded_new_tokens(rows, ranks) == padded
