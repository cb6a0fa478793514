"""On how many ranks and nodes a run may train."""

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.training.configuration.rank_counts import (
    describe_fitting,
    fitting_nodes,
    micro_batches_on,
    why_not_on,
)
from tests.training.runs import training_config

LAYOUTS = [
    {},
    {"tensor_model_parallel_size": 2},
    {"expert_model_parallel_size": 4},
    {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
]


def make(tmp_path, **changes):
    return training_config(tmp_path, tmp_path, dict.fromkeys(("el", "hu"), "x"), **changes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sample_of_a_batch_is_on_one_rank_once(layout, tmp_path):
    """Where a number of ranks is taken, their micro-batches together are the global batch."""
    config = make(tmp_path, global_batch_size=24, micro_batch_size=2, **layout)
    tp, pp, ep, etp = (
        layout.get(f"{name}_parallel_size", 1)
        for name in ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
    )
    for ranks in range(1, 49):
        copies = ranks / (tp * pp)
        whole = copies.is_integer() and (ranks / (ep * etp * pp)).is_integer() and (24 / (2 * copies)).is_integer()
        assert (why_not_on(config, ranks) is None) == whole, ranks
        if whole:
            assert micro_batches_on(config, ranks) * 2 * copies == 24


def test_interleaved_pipelines_need_as_many_micro_batches(tmp_path):
    config = make(
        tmp_path,
        global_batch_size=12,
        micro_batch_size=1,
        pipeline_model_parallel_size=2,
        num_virtual_stages_per_pipeline_rank=2,
    )
    assert micro_batches_on(config, 4) == 6
    with pytest.raises(UserError, match="needs the 3 micro-batches of a step to be a multiple of"):
        micro_batches_on(config, 8)


def test_numbers_of_nodes_that_fit_are_named(tmp_path):
    config = make(tmp_path, global_batch_size=24, micro_batch_size=2, expert_model_parallel_size=4)
    assert fitting_nodes(config, 2, range(1, 9)) == [2, 6]
    assert fitting_nodes(config, 4, range(1, 9)) == [1, 3]
    assert describe_fitting(config, 2, 8) == "numbers of nodes that fit: 2, 6"
    assert describe_fitting(config, 3, 2) == "numbers of nodes that fit: none up to 2"
