"""Planted faults: each is named with both ranks, their calls and their places in the code."""

import dataclasses

import pytest

from tests.rehearsal.records import call, exchange, found, in_phase, records, without

STEP = [
    call("all_gather", 0, 1, site="gather.py:3 in gather"),
    call("all_reduce", 0, 1, group="dp", site="sum.py:5 in sum"),
    call("all_reduce", 0, 1, group="dp", site="sum.py:9 in count"),
    call("reduce_scatter", 0, 1, site="scatter.py:4 in scatter"),
]


def test_equal_sequences_agree():
    assert found(records(STEP, STEP)) == []
    assert found(records(in_phase("save", STEP) + STEP, in_phase("save", STEP) + STEP)) == []


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("rank", [0, 1])
def test_a_skipped_collective_is_named_with_both_places(rank, place):
    calls = [STEP, without(STEP, place)]
    lines = found(records(*(calls if rank else calls[::-1])))
    skipped, meanwhile = STEP[place], ([*STEP, None])[place + 1]
    here, there = (made and f"in {made.kind} ({made.group}: 0, 1) at {made.site}" for made in (skipped, meanwhile))
    waits = f"step: rank {1 - rank} waits {here}, rank {rank} {f'is {there}' if there else 'has ended'}"
    assert len(lines) == 1 and lines[0].startswith(waits)


def test_a_skipped_collective_spoils_no_later_phase():
    calls = in_phase("save", STEP)
    lines = found(records(STEP[1:] + calls, STEP + calls))
    assert len(lines) == 1 and lines[0].startswith(
        "step: rank 1 waits in all_gather (tp: 0, 1) at gather.py:3 in gather"
    )


def test_the_rank_that_differs_from_most_is_named():
    step = [call("all_reduce", 0, 1, 2, site="a.py:1 in a"), call("barrier", 0, 1, 2)]
    (line,) = found(records(without(step, 0), step, step))
    assert line == (
        "step: rank 1 waits in all_reduce (tp: 0, 1, 2) at a.py:1 in a, rank 0 is in barrier (tp: 0, 1, 2) at "
        "barrier.py:1 in barrier; of their calls in this group there are 2 and 1"
    )


def test_a_rank_that_never_uses_a_group_is_named():
    (line,) = found(records(STEP, [made for made in STEP if made.group == "tp"]))
    assert "rank 0 waits in all_reduce (dp: 0, 1) at sum.py:5 in sum, rank 1 is in reduce_scatter (tp: 0, 1)" in line


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bytes": 32}, "rank 1 hands in 32 bytes of float32, rank 0 hands in 64 bytes of float32"),
        ({"dtype": "bfloat16"}, "rank 1 hands in 64 bytes of bfloat16, rank 0 hands in 64 bytes of float32"),
        ({"bytes": 32, "site": "b.py:2 in b"}, "rank 1 hands in 32 bytes of float32"),
    ],
)
def test_other_sizes_are_named_with_both_places(change, text):
    other = dataclasses.replace(STEP[0], **change)
    (line,) = found(records(STEP, [other, *STEP[1:]]))
    place = "all_gather (tp: 0, 1) at gather.py:3 in gather"
    assert text in line and line.endswith(place + (f" and {other.site}" if other.site != STEP[0].site else ""))


def test_another_root_is_named():
    (line,) = found(records([call("broadcast", 0, 1, peer=0)], [call("broadcast", 0, 1, peer=1)]))
    assert "rank 1 takes rank 1 as the root, rank 0 takes rank 0: broadcast (tp: 0, 1) at broadcast.py:1" in line


def test_bytes_of_objects_and_of_a_gather_may_differ():
    """Every rank pickles its own object; of a gather the root alone has room for all."""
    pairs = [(call("all_gather_object", 0, 1), {"bytes": 7}), (call("gather", 0, 1, peer=0), {"bytes": 99})]
    for made, change in pairs:
        assert found(records([made], [dataclasses.replace(made, **change)])) == []


def test_an_expert_without_tokens_is_no_fault_and_skipping_its_exchange_is():
    """Rank 1 has no token for its own expert and gets none: its part of the exchange is empty in one direction."""
    sent = [exchange((0, 1), (5, 0), (5, 3)), exchange((0, 1), (3, 0), (0, 0)), call("barrier", 0, 1, group="ep")]
    got = [exchange((0, 1), (3, 0), (0, 0)), exchange((0, 1), (0, 0), (0, 0)), sent[2]]
    assert found(records(sent[:1] + sent[2:], got[:1] + got[2:])) == []
    nobody = exchange((0, 1), (0, 0), (0, 0))
    assert found(records([nobody], [nobody])) == []
    (line,) = found(records(sent[:1] + sent[2:], sent[2:]))
    assert "rank 0 waits in all_to_all (ep: 0, 1) at dispatch.py:7 in dispatch, rank 1 is in barrier (ep: 0, 1)" in line


def test_other_split_sizes_are_named():
    (line,) = found(records([exchange((0, 1), (5, 2), (5, 3))], [exchange((0, 1), (3, 0), (4, 0))]))
    assert line == (
        "step: rank 0 sends 2 elements to rank 1, which expects 4: all_to_all (ep: 0, 1) at dispatch.py:7 in dispatch"
    )


def test_an_exchange_without_split_sizes_sends_as_much_to_each():
    whole = call("all_to_all", 0, 1, group="ep", size=4 * 6)
    assert found(records([whole], [exchange((0, 1), (3, 3), (3, 3))])) == []
    assert (
        "rank 0 sends 3 elements to rank 1, which expects 2"
        in found(records([whole], [exchange((0, 1), (3, 3), (2, 3))]))[0]
    )


def test_large_groups_are_shortened_and_equal_faults_counted():
    ranks = tuple(range(16))
    step = [call("all_reduce", *ranks, group="world")]
    calls = [step if rank else [] for rank in ranks]
    (line,) = found(records(*calls))
    assert "(world: 0, 1, 2, 3, 4, 5, 6, ... of 16 ranks)" in line
    pairs = [[call("all_reduce", rank - rank % 2, rank - rank % 2 + 1)][: rank % 2] for rank in ranks]
    (line,) = found(records(*pairs))
    assert line.startswith("step: rank 1 waits in") and line.endswith("(and 7 more alike)")
