"""Ranks that were not rehearsed: who stands in for them, on which groups."""

import dataclasses

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_moe_lpr.rehearsal.record import RankRecord
from megatron_moe_lpr.rehearsal.symmetry import World, all_parts
from tests.rehearsal.records import call, exchange, found, world

LAYOUTS = [
    (8, {"tp": 2, "ep": 2}),
    (16, {"tp": 4, "ep": 2}),
    (16, {"tp": 2, "pp": 2, "ep": 4}),
    (32, {"tp": 4, "pp": 2, "ep": 2, "etp": 2}),
    (24, {"pp": 3, "ep": 4}),
]


def groups(made: World, axes: str, expert: bool = False) -> list[tuple[int, ...]]:
    """Megatron's groups along some axes."""
    layout = made.layout
    tp = layout.expert_tensor_parallel_size if expert else layout.tensor_model_parallel_size
    ep = layout.expert_model_parallel_size if expert else 1
    pp = layout.pipeline_model_parallel_size
    ranks = RankGenerator(tp, ep, made.size // (tp * ep * pp), pp, 1, "tp-cp-ep-dp-pp").get_ranks(axes)
    return [tuple(group) for group in ranks]


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_groups_are_megatrons(size, layout):
    """The group of one rank, moved to any other, is the group in which Megatron puts that one."""
    made = world(size, **layout)
    kinds = [groups(made, axes) for axes in ("tp", "dp", "pp", "tp-pp", "tp-dp", "tp-dp-pp")]
    kinds += [groups(made, axes, expert=True) for axes in ("tp", "ep", "dp", "tp-ep", "tp-ep-pp")]
    for kind in kinds:
        by_rank = {rank: group for group in kind for rank in group}
        assert len(by_rank) == size
        for group in kind:
            assert all(made.moved(group, rank) == by_rank[rank] for rank in range(size))


def test_first_and_last_stage_of_a_pipeline():
    """Megatron's group for tied embeddings takes two stages of all."""
    made = world(16, tp=2, pp=4)
    assert made.moved((0, 12), 3) == (3, 15)
    assert made.moved((0, 12), 13) == (1, 13)
    assert made.moved((0, 12), 4) is None
    assert made.moved((0, 3, 5), 0) is None


def test_places_are_megatrons():
    made = world(32, tp=4, pp=2, ep=2)
    for group in groups(made, "dp"):
        assert [made.data_parallel_rank(rank) for rank in group] == list(range(4))
    for group in groups(made, "pp"):
        assert [made.stage(rank) for rank in group] == [0, 1]


def test_the_most_alike_rank_of_the_stage_stands_in():
    made = world(32, tp=4, pp=2)
    parts = all_parts([RankRecord(rank) for rank in (0, 1, 3, 16, 19)], made)
    stands_in = {rank: part.record.rank for rank, part in parts.items()}
    assert [stands_in[rank] for rank in range(16)] == [0, 1, 1, 3] * 4
    assert [stands_in[rank] for rank in range(16, 32)] == [16, 16, 16, 19] * 4
    # No rank of the second stage was rehearsed.
    assert set(all_parts([RankRecord(0)], made)) == set(range(16))


def step(rank: int, made: World) -> list:
    """A step of a rank, with calls on all kinds of groups and the sends of its pipeline stage."""
    own = {name: next(g for g in groups(made, name) if rank in g) for name in ("tp", "dp", "pp")}
    own["ep"] = next(g for g in groups(made, "ep", expert=True) if rank in g)
    stage, stages = made.stage(rank), len(own["pp"])
    calls = [call("broadcast", *own["tp"], peer=own["tp"][0])]
    for _ in range(3):
        if stage:
            calls.append(call("recv", *own["pp"], group="pp", peer=own["pp"][stage - 1]))
        share = (2,) * len(own["ep"])
        calls += [call("all_gather", *own["tp"]), exchange(own["ep"], share, share)]
        if stage + 1 < stages:
            calls.append(call("send", *own["pp"], group="pp", peer=own["pp"][stage + 1]))
    calls += [call("all_reduce", *own["dp"], group="dp"), call("all_reduce", *range(made.size), group="world")]
    return calls


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_a_sample_agrees_and_a_fault_between_kinds_of_ranks_is_found(size, layout):
    """Two ranks of each stage, none of which is in a group with the other."""
    made = world(size, **layout)
    stage_size = size // made.layout.pipeline_model_parallel_size
    sample = [rank for rank in range(size) if rank % stage_size in (0, stage_size - 1)]
    recorded = [RankRecord(rank, step(rank, made)) for rank in sample]
    assert found(recorded, made) == []
    # All ranks that the last one stands in for skip a call: only beside those of the first one does that show.
    kind = "all_gather" if layout.get("tp") else "all_to_all"
    last = recorded[-1]
    last.collectives.remove(next(made for made in last.collectives if made.kind == kind))
    assert found(recorded) == []
    assert any(f"waits in {kind} (" in line for line in found(recorded, made))


def test_split_sizes_are_not_taken_over():
    """They depend on the data: rank 0 sends more to rank 1 than a stand-in with its sizes would expect."""
    made = world(4, ep=2)
    uneven = exchange((0, 1), (1, 3), (1, 7))
    assert found([RankRecord(0, [uneven]), RankRecord(3, [exchange((2, 3), (9, 1), (2, 1))])], made) == []


def test_every_rank_of_a_group_sends_to_every_other():
    """As the distributed optimizer does on a CPU: all post what they receive, then what they send, and then wait."""
    made = world(16, tp=2, ep=4)

    def program(rank: int) -> list:
        group = next(group for group in groups(made, "dp") if rank in group)
        others = [other for other in group if other != rank]
        calls = [
            call(kind, *group, group="dp", peer=other, site=f"{kind}.py:1 in exchange")
            for kind in ("recv", "send")
            for other in others
        ]
        return [dataclasses.replace(made, awaited=len(calls) - 1 - place) for place, made in enumerate(calls)]

    for sample in (range(16), [0, 15], [3, 4], [1, 6, 9]):
        assert found([RankRecord(rank, program(rank)) for rank in sample], made) == []
    lines = found([RankRecord(3, program(3)), RankRecord(4, program(4)[1:])], made)
    assert lines and "receives nothing more" in lines[0]


def test_512_ranks_by_a_sample():
    """Every one of 512 ranks runs its calls; the deadlock of two kinds of ranks is named once."""
    made = world(512, tp=4, pp=4, ep=8)
    recorded = [RankRecord(rank, step(rank, made)) for rank in range(512) if rank % 128 in (0, 3, 124, 127)]
    assert len(recorded) == 16 and found(recorded, made) == []
    for record in recorded:
        if record.rank % 4 == 3:
            first, second = record.collectives[-2:]
            record.collectives[-2:] = [second, first]
    lines = found(recorded, made)
    assert len(lines) == 1 and lines[0].startswith("step: deadlock: rank ")
    assert "all_reduce (dp: " in lines[0] and "all_reduce (world: " in lines[0]
