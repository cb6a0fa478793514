"""Which ranks stand for all others."""

import pytest

from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.rehearsal.world import sample_ranks

CASES = [
    # Groups by Megatron's order tp-cp-ep-dp-pp: TP of neighbours, PP the farthest apart.
    ({}, 1, [0]),
    ({}, 8, [0, 7]),
    ({"tensor_model_parallel_size": 2}, 8, [0, 1, 6, 7]),
    ({"expert_model_parallel_size": 4}, 8, [0, 3, 4, 7]),
    ({"pipeline_model_parallel_size": 4}, 8, [0, 1, 4, 5, 6, 7]),
    ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 16,
     [0, 1, 6, 8, 9, 14]),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "world_size", "expected"), CASES, ids=str)
def test_sample(layout, world_size, expected):
    assert sample_ranks(ParallelLayout(**layout), world_size) == expected


def test_a_sample_does_not_grow_with_the_world():
    layout = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=8, expert_model_parallel_size=4)
    small, large = (sample_ranks(layout, size) for size in (64, 4096))
    assert len(large) <= 3 * 6 and len(small) <= len(large)
    # One of the first, of a middle and of the last pipeline rank.
    assert {rank // (4096 // 8) for rank in large} == {0, 4, 7}
