"""The description of the model's parameters against closed forms, and what derives from it."""

import dataclasses

import pytest

from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.configuration.families import FAMILIES
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind, kind_of
from megatron_moe_lpr.model.flops import training_flops_per_token
from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, model_rows
from megatron_moe_lpr.parallel.layout import ParallelLayout
from tests.model.sizes import SMALL

D, F, Q, KV, V = 32, 48, 32, 16, 200
"""Hidden size, FFN, query and key widths, vocabulary of SMALL."""
ATTENTION, FFN = D * (Q + 2 * KV) + Q * D, 3 * D * F
EXPANDED = ((2, 0, 4), (4, 0, 1))
"""New experts of three layers by expansion."""
NO_MIXTURE = {"base experts": 0, "base router rows": 0, "shared expert": 0}


def shape(experts, top_k=2, family="qwen2", expansions=(), inserted=(), **changes) -> ModelShape:
    fields = SMALL | {"model_type": family, "num_hidden_layers": len(experts), "head_dim": 8} | changes
    return ModelShape(read_architecture(fields), experts, top_k, expansions=expansions, inserted_blocks=inserted)


@pytest.mark.parametrize(("family", "extra"), [("qwen2", Q + 2 * KV), ("qwen3", 2 * 8), ("llama", 0)])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_each_kind(family, extra, tied):
    """`extra`: biases of queries, keys and values, or norms of queries and keys."""
    model = shape((7, 1, 6), family=family, expansions=EXPANDED, tie_word_embeddings=tied)
    found = dict.fromkeys(ParameterKind, 0)
    for parameter in model.parameters:
        found[parameter.kind] += parameter.size
    norms = 3 * 2 * D + D
    assert found == {
        "router": (7 + 6) * D,
        "new experts": (4 + 1) * FFN,
        "earlier experts": (2 + 4) * FFN,
        "original expert": 2 * FFN,
        "inserted blocks": 0,
        "dense FFN": FFN,
        "attention": 3 * (ATTENTION + (extra if family == "qwen2" else 0)),
        "norm": norms + (3 * extra if family == "qwen3" else 0),
        "embedding": (1 if tied else 2) * V * D,
        "new vocabulary rows": 0,
        "earlier vocabulary rows": 0,
        **NO_MIXTURE,
    }


def test_parameters_and_operations_of_a_mixture_base():
    """Of 8 experts of width 24, a gated shared expert of width 40, and new experts in two of three layers."""
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    fields = sizes | {"shared_expert_intermediate_size": 40, "tie_word_embeddings": True}
    model = shape((12, 8, 9), family="qwen2_moe", expansions=((4, 0, 1),), **fields)
    found = dict.fromkeys(NO_MIXTURE | dict.fromkeys(("router", "new experts", "original expert"), 0), 0)
    for parameter in model.parameters:
        if parameter.kind in found:
            found[parameter.kind] += parameter.size
    expert = 3 * D * 24
    assert found == {
        "base experts": 3 * 8 * expert,
        "base router rows": 3 * 8 * D,
        "shared expert": 3 * (3 * D * 40 + D),
        "router": (4 + 1) * D,
        "new experts": (4 + 1) * expert,
        "original expert": 0,
    }
    assert [model.dispatched_groups(layer) for layer in range(3)] == [(8, 4), (8, 0), (8, 1)]
    always = 3 * (4 * ATTENTION + 3 * 2 * Q * 128) + 4 * D * V
    always += 3 * 4 * (2 * expert + 3 * D * 40 + D) + 4 * D * (12 + 8 + 9)
    trained = 2 * D * (4 + 1) + 2 * 2 * expert * (4 / 12 + 1 / 9)
    assert training_flops_per_token(model, {"router", "new experts"}, 128) == pytest.approx(always + trained)


@pytest.mark.parametrize("tied", [False, True])
def test_flops(tied):
    """A product costs 2 operations a weight in the forward pass, for its input's gradient, and for its own."""
    scores = 3 * 2 * Q * 128
    always = 3 * (4 * ATTENTION + scores) + 4 * D * V + 4 * D * (7 + 6)
    ffn = 4 * FFN + 2 * 4 * 2 * FFN
    model = shape((7, 1, 6), expansions=EXPANDED, tie_word_embeddings=tied)
    assert training_flops_per_token(model, (), 128) == always + ffn
    trained = 2 * D * (7 + 6) + 2 * 2 * FFN * (4 / 7 + 1 / 6)
    assert training_flops_per_token(model, {"router", "new experts"}, 128) == pytest.approx(always + ffn + trained)
    assert training_flops_per_token(model, frozenset(ParameterKind), 128) == (
        3 * (6 * ATTENTION + scores) + 6 * D * V + 6 * D * (7 + 6) + 6 * FFN * 5
    )


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens(tied):
    """Each costs 2 products of a token with its output row, and a third where it trains; looking it up costs none."""
    model = dataclasses.replace(shape((7,), tie_word_embeddings=tied), new_tokens=(30, 20))
    plain, matrices = shape((7,), tie_word_embeddings=tied), 1 if tied else 2
    assert model.total_vocab_size == V + 50
    sizes = {kind: sum(one.size for one in model.parameters if one.kind is kind) for kind in ParameterKind}
    assert sizes["new vocabulary rows"] == matrices * 20 * D and sizes["embedding"] == matrices * V * D
    assert sizes["earlier vocabulary rows"] == matrices * 30 * D
    trains = {"router", "new experts", "new vocabulary rows"}
    more = training_flops_per_token(model, trains, 128) - training_flops_per_token(plain, trains, 128)
    assert more == pytest.approx(2 * D * (2 * 30 + 3 * 20))


def test_flops_of_an_inserted_block():
    found = training_flops_per_token(shape((1, 1), inserted=(1,)), {"inserted blocks"}, 16)
    assert found == 2 * (4 * (ATTENTION + FFN) + 3 * 2 * Q * 16) + 2 * (ATTENTION + FFN) + 4 * D * V


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_described_parameters(family):
    """Every tensor of the table of names, whose kind is the one that training reads from the name."""
    model = shape((7, 1, 6), family=family, expansions=EXPANDED)
    rows = model_rows(model.architecture, model.experts_per_layer, DENSE_LAYOUT, EXPANDED)
    assert [row.kind for row in rows] == [kind_of(row.key) for row in rows]
    assert len({row.key for row in rows}) == len(rows)
    for kind in ParameterKind:
        described = sum(parameter.size for parameter in model.parameters if parameter.kind is kind)
        elements = [row.shape[0] * (row.shape[1] if len(row.shape) > 1 else 1) for row in rows if row.kind is kind]
        assert sum(elements) == described


def test_parts_of_ranks():
    layout = ParallelLayout(2, expert_model_parallel_size=3, expert_tensor_parallel_size=4)
    shapes = {parameter.name: parameter.rank_shape(layout) for parameter in shape((7,)).parameters}
    sizes = {parameter.name: parameter.rank_size(layout) for parameter in shape((7,)).parameters}
    assert shapes["self_attention.linear_qkv.weight"] == ((Q + 2 * KV) // 2, D)
    assert shapes["self_attention.linear_proj.weight"] == (D, Q // 2)
    assert shapes["mlp.original_expert.linear_fc1.weight"] == (2 * F // 2, D)
    assert shapes["mlp.experts.linear_fc2.weight"] == (D, F // 4)
    assert sizes["mlp.experts.linear_fc2.weight"] == 2 * D * F // 4
    assert sizes["mlp.router.weight"] == 7 * D
