"""All checks together: one line for each fault, in the order of the run."""

import dataclasses

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.rehearsal.checks import check_records
from megatron_moe_lpr.rehearsal.data_share import GlobalBatch, all_shares
from megatron_moe_lpr.rehearsal.findings import report
from megatron_moe_lpr.rehearsal.record import RankRecord
from tests.rehearsal.records import call, in_phase, world

WORLD, BATCH = world(4, tp=2), GlobalBatch(8, 2)


def recorded(rank: int) -> RankRecord:
    """A rank that starts, steps and saves."""
    tp = (rank - rank % 2, rank - rank % 2 + 1)
    step = [call("all_gather", *tp), call("all_reduce", 0, 1, 2, 3, group="world")]
    calls = in_phase("start", step) + step + in_phase("save", step[1:])
    data = {"samples": all_shares(WORLD, BATCH)[rank]}
    return RankRecord(rank, calls, files=[(f"__{rank}_0.distcp", 64)], data=data)


def test_faults_of_every_kind_are_listed_in_order():
    ranks = [recorded(rank) for rank in range(4)]
    assert check_records(ranks, WORLD, BATCH) == check_records(ranks[1:2], WORLD, BATCH) == []
    ranks[1].files = ranks[0].files
    ranks[2].collectives.remove(next(made for made in ranks[2].collectives if made.phase == "save"))
    ranks[3].data = {"samples": [[2, 3], [6, 6]]}
    ranks[3].collectives[0] = dataclasses.replace(ranks[3].collectives[0], bytes=8)
    lines = report(check_records(ranks, WORLD, BATCH)).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["start", "step", "save", "save"]
    assert "rank 3 hands in 8 bytes of float32, rank 2 hands in 64 bytes" in lines[0]
    assert "rank 3 reads samples 6, 6 in micro-batch 2, rank 2 of the same data-parallel rank reads" in lines[1]
    assert "rank 0 waits in all_reduce (world: 0, 1, 2, 3) at " in lines[2] and "rank 2 has ended" in lines[2]
    assert lines[3] == "save: file __0_0.distcp is written more than once: by ranks 0, 1"


def test_a_layout_that_does_not_divide_ends_as_training_does():
    with pytest.raises(UserError, match="6 ranks cannot hold TP 4 x PP 1 = 4 ranks per model copy"):
        check_records([], world(6, tp=4), BATCH)
