"""Layout checks: what fits passes, what doesn't names the numbers and what would."""

import dataclasses

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.parallel.layout import ParallelLayout

MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "experts_per_layer": (5, 5, 5, 5),
}


def test_data_parallel_size_is_derived():
    layout = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    layout.check_world(8)
    assert layout.data_parallel_size(8) == 2
    assert dataclasses.replace(layout, context_parallel_size=2).data_parallel_size(8) == 1


def test_sequence_parallelism_needs_tensor_parallelism():
    assert not ParallelLayout().uses_sequence_parallel
    assert ParallelLayout(tensor_model_parallel_size=2).uses_sequence_parallel


@pytest.mark.parametrize(
    ("fields", "world", "words"),
    [
        ({"tensor_model_parallel_size": 2}, 3, "multiple of 2 ranks"),
        ({"expert_model_parallel_size": 4}, 2, "EP 4 .* multiple of 4"),
        ({"tensor_model_parallel_size": 0}, 2, "--tensor-model-parallel-size 0"),
        ({"num_virtual_stages_per_pipeline_rank": 2}, 2, "--pipeline-model-parallel-size"),
        ({"context_parallel_size": 2}, 3, "TP 1 x PP 1 x CP 2 = 2 ranks per model copy"),
        ({"context_parallel_size": 0}, 2, "--context-parallel-size 0"),
    ],
)
def test_worlds_that_do_not_fit(fields, world, words):
    with pytest.raises(UserError, match=words):
        ParallelLayout(**fields).check_world(world)


@pytest.mark.parametrize(
    ("fields", "changes", "words"),
    [
        ({"tensor_model_parallel_size": 4}, {}, "does not divide 2 key/value heads; it can be one of 1, 2"),
        ({"tensor_model_parallel_size": 3}, {}, "does not divide 4 attention heads; it can be one of 1, 2, 4"),
        ({"pipeline_model_parallel_size": 3}, {}, "3 does not divide 4 layers; it can be one of 1, 2, 4"),
        (
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 4},
            {},
            "x --num-virtual-stages-per-pipeline-rank 8 does not divide 4 layers",
        ),
        (
            {"expert_model_parallel_size": 3},
            {},
            "3 does not divide 4 new experts .* 1, 2, 4, .* --num-experts 4, 7, 10",
        ),
        ({"expert_model_parallel_size": 2}, {"experts_per_layer": (1, 1, 1, 1)}, "the checkpoint is dense"),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": False}, {}, "need sequence parallelism"),
        ({"expert_tensor_parallel_size": 5}, {}, "--expert-tensor-parallel-size 5 does not divide 96"),
    ],
)
def test_models_that_do_not_fit(fields, changes, words):
    with pytest.raises(UserError, match=words):
        ParallelLayout(**fields).check_model(**(MODEL | changes))


def test_fitting_layouts_pass():
    ParallelLayout(tensor_model_parallel_size=2, expert_model_parallel_size=4).check_model(**MODEL)
    ParallelLayout(pipeline_model_parallel_size=4).check_model(**MODEL)


def test_sequence_length_must_split():
    with pytest.raises(UserError, match="does not divide 33 tokens"):
        ParallelLayout(tensor_model_parallel_size=2).check_sequence(33)
    ParallelLayout().check_sequence(33)
    with pytest.raises(UserError, match="4 does not divide 34 tokens a sequence; change --seq-length"):
        ParallelLayout(context_parallel_size=2).check_sequence(34)
    both = ParallelLayout(tensor_model_parallel_size=4, context_parallel_size=2)
    with pytest.raises(UserError, match="4 does not divide 18 tokens of a sequence on each of 2 CP ranks"):
        both.check_sequence(36)
    both.check_sequence(40)
