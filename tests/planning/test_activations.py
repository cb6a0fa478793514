"""What the plan says of activations after a second expansion or block expansion, against the closed form."""

import dataclasses
import functools

import pytest

from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.activations import kept_bytes
from megatron_moe_lpr.planning.memory import placeholder_bytes
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.training.configuration.stages import STAGES
from tests.fuzzing.targets import DENSE, MOE

SHAPE = ModelShape(read_architecture(DENSE, "config"), (7, 1), 2)
EXPANDED = dataclasses.replace(SHAPE, expansions=((4, 0), (2, 0)))
DENSE_SHAPE = ModelShape(dataclasses.replace(SHAPE.architecture, num_layers=4), (1,) * 4, 1)
ONE_RANK = ParallelLayout()
TOKENS = 64


def planned(
    shape: ModelShape, stage: str, routing="balanced", needs=kept_bytes, layout=ONE_RANK, rank=0, tokens=TOKENS, **sizes
) -> float:
    fields = {"global_batch_size": 1, "routing": routing} | sizes
    sizes = RunSizes(STAGES[stage].trains, layout.model_parallel_size, tokens, **fields)
    return needs(PlannedRun(shape, layout, sizes), rank)


def test_rows_of_earlier_experts_keep_no_input():
    """Of a token's 2 experts 2 x 4/7 are earlier ones; each would keep its input and its second product's, in bf16. Nor
    are the original expert's rows kept, 2/7 a token, which lie in one tensor with those of experts that all train."""
    hidden = 2 * SHAPE.architecture.hidden_size
    inputs = hidden + 2 * SHAPE.architecture.ffn_hidden_size
    difference = planned(SHAPE, "1") - planned(EXPANDED, "1")
    assert difference == pytest.approx(TOKENS * (2 * 4 / 7 * inputs + 2 / 7 * hidden))


@pytest.mark.parametrize(("family", "values"), [("granite", 0), ("olmo2", 4 * (32 + 16) // 2), ("cohere", -32)])
def test_norms_of_other_families(family, values):
    """OLMo 2 keeps queries and keys in fp32 as its norm of all heads gets them; a parallel block has one norm less."""
    fields = DENSE | {"model_type": family, "tie_word_embeddings": False}
    other = dataclasses.replace(SHAPE, architecture=read_architecture(fields, "config"), experts_per_layer=(7,) * 2)
    llama = dataclasses.replace(other, architecture=read_architecture(fields | {"model_type": "llama"}, "config"))
    assert planned(other, "2") - planned(llama, "2") == pytest.approx(TOKENS * 2 * 2 * values)


@pytest.mark.parametrize(("stage", "matrices"), [("1", 3), ("2", 0)])
def test_one_placeholder_stands_for_all_weight_gradients_of_a_shape(stage, matrices):
    """Of new experts: gate and up together, and down, in bf16, however many experts train."""
    size = 2 * matrices * SHAPE.architecture.hidden_size * SHAPE.architecture.ffn_hidden_size
    assert planned(EXPANDED, stage, needs=placeholder_bytes) == planned(SHAPE, stage, needs=placeholder_bytes) == size


@pytest.mark.parametrize(("stage", "routing"), [("2", "balanced"), ("full", "balanced"), ("1", "worst")])
def test_where_nothing_differs(stage, routing):
    """Neither trains, both train, or all tokens choose the latest experts."""
    assert planned(EXPANDED, stage, routing) == planned(SHAPE, stage, routing)


def test_only_inserted_blocks_keep_inputs():
    """Beside `full`, of 4 blocks the 2 that are frozen keep no input of their 4 matrices (attention's output is kept by
    attention itself): hidden twice, FFN once; nor does the output matrix. All in bf16."""
    grown = dataclasses.replace(DENSE_SHAPE, inserted_blocks=(1, 3))
    inputs = 2 * (2 * grown.architecture.hidden_size + grown.architecture.ffn_hidden_size)
    output_matrix = 2 * grown.architecture.hidden_size
    difference = planned(grown, "full") - planned(grown, "blocks")
    assert difference == pytest.approx(TOKENS * (2 * inputs + output_matrix))
    everywhere = dataclasses.replace(DENSE_SHAPE, inserted_blocks=(0, 1, 2, 3))
    assert planned(everywhere, "blocks") == planned(grown, "full") - TOKENS * output_matrix


def test_placeholders_of_inserted_blocks_are_where_they_are():
    """On a pipeline rank that has inserted blocks as under `full`; on one that has none, none."""
    grown = dataclasses.replace(DENSE_SHAPE, inserted_blocks=(3,))
    halves = ParallelLayout(pipeline_model_parallel_size=2)
    held = functools.partial(planned, grown, needs=placeholder_bytes, layout=halves, tokens=8)
    assert held("blocks", rank=1) == held("full", rank=1) > 0
    assert held("blocks", rank=0) == held("2", rank=0) == 0


def test_what_local_layers_keep():
    """In stage 2 the lowest layer's attention keeps nothing. The other one's: queries, keys and values of all heads and
    the output, a number a head, and angles; both routers 9 bytes an expert and 24 a choice; the input of the norm of
    the second attention, of all norms behind it, and of the routers; gate and up of two experts a token; angles."""
    architecture, experts, top_k = SHAPE.architecture, SHAPE.experts_per_layer, SHAPE.top_k
    heads, head_dim, hidden = architecture.num_attention_heads, architecture.head_dim, architecture.hidden_size
    assert heads > architecture.num_query_groups and len(experts) == 2
    both = dataclasses.replace(SHAPE, experts_per_layer=(7, 7))
    attention = 2 * 4 * heads * head_dim + 4 * heads + 2 * 4 * head_dim
    routing = 2 * (9 * 7 + 24 * top_k)
    stream = 2 * hidden * (2 + 3)
    products = 2 * top_k * 2 * 2 * architecture.ffn_hidden_size
    expected = TOKENS * (attention + routing + stream + products + 4 * head_dim)
    assert planned(both, "2", transformer_engine=False) == pytest.approx(expected)


def test_local_layers_of_a_mixture_below_its_first_new_expert_keep_nothing():
    mixture = read_architecture(MOE | {"mlp_only_layers": []}, "config")
    shape = ModelShape(mixture, (3, 5), 2, expansions=((0, 2),))
    above = ModelShape(dataclasses.replace(mixture, num_layers=1), (5,), 2, expansions=((2,),))
    kept = [planned(one, "1", transformer_engine=False) for one in (shape, above)]
    assert kept[0] == kept[1] > 0


def test_a_mask_of_a_window_belongs_to_positions():
    """[sequence, sequence] in bf16 for each layer with a backward pass, however many samples there are."""
    both = dataclasses.replace(SHAPE, experts_per_layer=(7, 7))
    windowed = dataclasses.replace(both, architecture=dataclasses.replace(both.architecture, sliding_window=16))
    for samples in (1, 2):
        sizes = {"transformer_engine": False, "micro_batch_size": samples, "global_batch_size": samples}
        assert planned(windowed, "2", **sizes) - planned(both, "2", **sizes) == pytest.approx(2 * TOKENS**2)
