"""The line about another number of ranks in a resumed run."""

import json

import pytest

from megatron_moe_lpr.training.configuration.config_file import write_run_config
from megatron_moe_lpr.training.configuration.rank_notes import count_ranks, rank_notes, read_ranks
from tests.training.runs import training_config


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that begins a run and returns its notes, as pretrain.py does."""

    def begin(ranks: int, nodes: str, **changes) -> list[str]:
        monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
        config = training_config(tmp_path, tmp_path, dict.fromkeys(("el", "hu"), "x"), **changes)
        before, now = read_ranks(tmp_path), count_ranks(config, ranks)
        write_run_config(config, now)
        return rank_notes(before, now, config.batch.global_batch_size)

    return begin


def test_fewer_and_more_nodes_are_told(start):
    assert start(4, "2") == []  # the first start
    assert start(4, "2") == []
    assert start(2, "1") == [
        "resumes with 2 ranks on 1 node instead of 4 ranks on 2 nodes: DP 2 instead of 4, gradient accumulation 2x "
        "(2 micro-batches a step instead of 1); the global batch stays 8"
    ]
    assert start(4, "2", tensor_model_parallel_size=2) == [
        "resumes with 4 ranks on 2 nodes instead of 2 ranks on 1 node: DP 2 instead of 2, gradient accumulation 1x "
        "(2 micro-batches a step instead of 2); the global batch stays 8"
    ]


def test_another_global_batch_is_not_said_to_stay(start):
    start(2, "")
    assert start(1, "", global_batch_size=16) == [
        "resumes with 1 rank instead of 2 ranks: DP 1 instead of 2, gradient accumulation 4x (8 micro-batches a step "
        "instead of 2); the global batch is 16 instead of 8"
    ]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", json.dumps({"world_size": 2, "data_parallel_size": 2, "num_microbatches": "x"})]
)
def test_a_record_that_does_not_tell_the_ranks_gives_no_line(content, start, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert start(1, "1") == []
    assert start(2, "1") != []
