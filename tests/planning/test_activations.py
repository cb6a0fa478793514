"""What the plan says of activations after a second expansion, against the closed form."""

import dataclasses

import pytest

from megatron_moe_lpr.model.architecture import read_architecture
from megatron_moe_lpr.model.config import ModelShape
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.activations import kept_bytes, working_bytes
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.training.stages import STAGES
from tests.fuzzing.targets import DENSE

SHAPE = ModelShape(read_architecture(DENSE, "config"), (7, 1), 2)
EXPANDED = dataclasses.replace(SHAPE, expansions=((4, 0), (2, 0)))
TOKENS = 64


def planned(shape: ModelShape, stage: str, routing: str = "balanced", needs=kept_bytes) -> float:
    sizes = RunSizes(STAGES[stage].trains, 1, TOKENS, global_batch_size=1, routing=routing)
    return needs(shape, ParallelLayout(), sizes, "none", 0)


def test_rows_of_earlier_experts_keep_no_input():
    """Of a token's 2 experts 2 x 4/7 are earlier ones; each would keep its input and its second product's, in bf16."""
    inputs = 2 * (SHAPE.architecture.hidden_size + SHAPE.architecture.ffn_hidden_size)
    difference = planned(SHAPE, "1") - planned(EXPANDED, "1")
    assert difference == pytest.approx(TOKENS * 2 * 4 / 7 * inputs)


def test_they_have_no_weight_gradients():
    assert planned(EXPANDED, "1", needs=working_bytes) < planned(SHAPE, "1", needs=working_bytes)


@pytest.mark.parametrize(("stage", "routing"), [("2", "balanced"), ("full", "balanced"), ("1", "worst")])
def test_where_nothing_differs(stage, routing):
    """Neither trains, both train, or all tokens choose the latest experts."""
    assert planned(EXPANDED, stage, routing) == planned(SHAPE, stage, routing)
