"""Shares of the data of every rank, by the sampler of a training run; planted faults are named."""

import pytest

from megatron_moe_lpr.data.reading.batches import build_data_iterator
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.rehearsal.data_share import GlobalBatch, all_shares, check_data_shares
from megatron_moe_lpr.rehearsal.record import RankRecord
from tests.data.reading.test_batches import Numbers
from tests.rehearsal.records import world

BATCH = GlobalBatch(global_batch_size=16, micro_batch_size=2, consumed_samples=32)
WORLD = world(8, tp=2, ep=2)
"""Four data-parallel ranks: 0 and 1, 2 and 3, 4 and 5, 6 and 7."""


def lines(made: list[RankRecord], batch: GlobalBatch = BATCH) -> list[str]:
    return [str(finding) for finding in check_data_shares(made, WORLD, batch)]


def recorded(**samples: list[list[int]]) -> list[RankRecord]:
    """All ranks with their shares, but those of some ranks: `rank_3=[[1, 2]]`."""
    shares = all_shares(WORLD, BATCH) | {int(name.removeprefix("rank_")): share for name, share in samples.items()}
    return [RankRecord(rank, data={"samples": share}) for rank, share in shares.items()]


def test_shares_are_what_the_iterator_reads():
    shares = all_shares(WORLD, BATCH)
    for rank, share in shares.items():
        batches = build_data_iterator(Numbers(), 32, 2, rank // 2, 4)
        assert share == [next(batches)["tokens"][:, 0].tolist() for _ in range(2)]
    assert shares[2] == shares[3] == [[34, 35], [42, 43]]
    assert lines(recorded()) == lines(recorded()[2:3]) == []


def test_a_duplicated_sample_is_named():
    twice = [[34, 34], [42, 43]]
    assert lines(recorded(rank_2=twice, rank_3=twice)) == [
        "step: sample 34 is read more than once: by ranks 2, 2",
        "step: sample 35 of the step is read by no rank",
    ]
    others = [[32, 33], [42, 43]]
    assert lines(recorded(rank_2=others, rank_3=others)) == [
        "step: sample 32 is read more than once: by ranks 0, 2 (and 1 more alike)",
        "step: sample 34 of the step is read by no rank (and 1 more alike)",
    ]


def test_a_sample_beside_ranks_that_were_not_rehearsed():
    (line,) = lines([RankRecord(2, data={"samples": [[34, 35], [40, 41]]})])
    assert line == (
        "step: rank 2 reads samples 40, 41 in micro-batch 2, rank 3 of the same data-parallel rank reads samples 42, 43"
    )


def test_unequal_ranks_of_a_copy():
    (line,) = lines(recorded(rank_3=[[34, 35]]))
    assert line == (
        "step: rank 3 reads nothing in micro-batch 2, rank 2 of the same data-parallel rank reads samples 42, 43"
    )


def test_a_resumed_run_that_begins_anew_is_named():
    """As if the counter of consumed samples had not been restored."""
    found = lines([RankRecord(r, data={"samples": s}) for r, s in all_shares(WORLD, GlobalBatch(16, 2)).items()])
    assert found == [
        "step: rank 0 reads sample 0, which is not of the step's 32 to 47 (and 15 more alike)",
        "step: sample 32 of the step is read by no rank (and 15 more alike)",
    ]


def test_what_does_not_divide_ends_as_training_does():
    with pytest.raises(UserError, match="--global-batch-size 18 is not a multiple of --micro-batch-size 2 x 4"):
        lines(recorded(), GlobalBatch(18, 2))
    with pytest.raises(UserError, match="9 ranks cannot hold TP 2 x PP 1 = 2 ranks per model copy"):
        all_shares(world(9, tp=2), BATCH)
    with pytest.raises(UserError, match=r"8 ranks cannot hold expert TP 1 x EP 3 x PP 1 = 3 ranks"):
        all_shares(world(8, ep=3), BATCH)


@pytest.mark.parametrize(("size", "layout"), [(8, {}), (64, {"tp": 4, "ep": 8}), (512, {"tp": 4, "pp": 4, "ep": 8})])
def test_all_ranks_of_large_worlds(size, layout):
    """Reference: Megatron's order of ranks, TP fastest, then DP, then PP; rank r of DP reads the r-th micro-batch."""
    made, tp = world(size, **layout), layout.get("tp", 1)
    ranks = size // tp // layout.get("pp", 1)
    batch = GlobalBatch(512, 2, 1024)
    shares = all_shares(made, batch)
    for rank, share in shares.items():
        first = 1024 + 2 * (rank // tp % ranks)
        assert share == [[place, place + 1] for place in range(first, 1536, 2 * ranks)]
    assert check_data_shares([], made, batch) == []
