"""The checks of a rehearsal on four real gloo ranks that start, train two steps and save: they agree in everything."""

import dataclasses

import pytest

from megatron_moe_lpr.rehearsal.agreement import check_agreement
from megatron_moe_lpr.rehearsal.checkpoint_files import check_files, check_shards, total_bytes
from megatron_moe_lpr.rehearsal.data_share import GlobalBatch, check_data_shares
from tests.distributed import rank_pool
from tests.rehearsal.records import world
from tests.rehearsal.running_ranks import RunningRank, record_training
from tests.training.runs import make_checkpoint, make_data

RANKS = 4
PAIRED = ("send", "recv")
LAYOUTS = {
    "TP2xEP2, distributed optimizer": ({"tp": 2, "ep": 2}, {"use_distributed_optimizer": True}),
    "EP2xPP2 interleaved": ({"ep": 2, "pp": 2}, {"num_virtual_stages_per_pipeline_rank": 2}),
    "expert TP2 without TP": ({"etp": 2}, {}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded")
    return make_checkpoint(root), make_data(root)


@pytest.mark.parametrize("name", LAYOUTS)
def test_four_ranks_agree(name, inputs, tmp_path):
    short, options = LAYOUTS[name]
    made = world(RANKS, **short)
    layout = {field: size for field, size in dataclasses.asdict(made.layout).items() if size > 1}
    batch = {"global_batch_size": 8, "micro_batch_size": 1}
    changes = {"train_iters": 2, **batch, **layout, **options}
    ranks = rank_pool(RANKS).run(_recorded, inputs, tmp_path / "run", changes)
    records = [rank.record for rank in ranks]
    written = [shard for rank in ranks for shard in rank.written]
    held = [shard for rank in ranks for shard in rank.held]

    assert [str(finding) for finding in check_agreement(records, made)] == []
    micro_batches = 8 // made.layout.data_parallel_size(RANKS)
    for record in records:
        record.data["samples"] = record.data["samples"][:micro_batches]
    assert check_data_shares(records, made, GlobalBatch(**batch)) == []
    assert check_files(records, written) == check_shards(written, held) == []
    tensors = [shard for shard in written if shard.shape]
    assert sum(shard.bytes for shard in tensors) == total_bytes(held) > 0
    if made.layout.expert_model_parallel_size > 1:
        kinds = {call.kind for record in records for call in record.collectives}
        assert {"all_reduce", "all_to_all", "all_gather", "broadcast", "send", "recv"} <= kinds
    exchanges = [pair for rank in ranks for pair in rank.described]
    assert exchanges and all(described == expected for described, expected in exchanges)
    _check_that_faults_show(ranks)


def _recorded(inputs, save, changes) -> RunningRank:
    return record_training(inputs[0], save, inputs[1], **changes)


def _check_that_faults_show(ranks: list[RunningRank]) -> None:
    """The same records with a collective of the middle, or a send or receive, left out on each rank in turn."""
    for rank in ranks:
        calls = rank.record.collectives
        for is_exchange in (False, True):
            places = range(len(calls) // 2, len(calls))
            chosen = [i for i in places if (calls[i].kind in PAIRED) == is_exchange]
            place = next((i for i in chosen if len(calls[i].ranks) > 1), None)
            if place is None:
                continue
            left_out = calls[place]
            rank.record.collectives = calls[:place] + calls[place + 1 :]
            # Of a send or receive the other side waits.
            sign = f"rank {left_out.peer} waits in " if is_exchange else left_out.site
            assert any(sign in str(finding) for finding in check_agreement([r.record for r in ranks]))
            rank.record.collectives = calls
