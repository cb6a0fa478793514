"""Ranks that wait for each other are found; pipelines in which each end waits in its turn are not."""

import dataclasses

import pytest

from tests.rehearsal.records import call, found, records

FORWARD, BACKWARD = "send_forward.py:1 in forward", "send_backward.py:2 in backward"
PIPELINE = {"group": "pp"}


def send(peer: int, *ranks: int, site: str = FORWARD, **further):
    return call("send", *ranks, peer=peer, site=site, **PIPELINE, **further)


def receive(peer: int, *ranks: int, site: str = FORWARD, **further):
    return call("recv", *ranks, peer=peer, site=site, **PIPELINE, **further)


def test_two_groups_in_opposite_order_are_a_deadlock():
    first = call("all_reduce", 0, 1, group="tp", site="a.py:1 in a")
    second = call("all_gather", 0, 1, group="ep", site="b.py:2 in b")
    assert found(records([first, second], [first, second])) == []
    (line,) = found(records([first, second], [second, first]))
    assert line == (
        "step: deadlock: rank 0 waits in all_reduce (tp: 0, 1) at a.py:1 in a for rank 1, "
        "rank 1 waits in all_gather (ep: 0, 1) at b.py:2 in b for rank 0"
    )


def test_a_ring_of_three_groups_is_a_deadlock():
    pairs = {
        name: call("all_reduce", *ranks, group=name, site=f"{name}.py:1 in {name}")
        for name, ranks in {"a": (0, 1), "b": (1, 2), "c": (0, 2)}.items()
    }
    right = [[pairs["a"], pairs["c"]], [pairs["a"], pairs["b"]], [pairs["b"], pairs["c"]]]
    assert found(records(*right)) == []
    (line,) = found(records([pairs["a"], pairs["c"]], [pairs["b"], pairs["a"]], [pairs["c"], pairs["b"]]))
    assert "deadlock" in line
    assert all(f"at {name}.py:1 in {name} for rank" in line for name in pairs)


def test_a_ring_behind_a_wait_is_found():
    """Rank 0 waits first for rank 1, which has no way back, and is itself in no ring."""
    world = call("barrier", 0, 1, 2, group="world")
    one, two = call("all_reduce", 1, 2, group="tp"), call("all_gather", 1, 2, group="ep")
    (line,) = found(records([world], [one, two, world], [two, one, world]))
    assert "rank 1 waits in all_reduce" in line and "rank 2 waits in all_gather" in line and "rank 0" not in line


def test_both_ends_receive_first():
    """Blocking calls; as one batch, both are posted before either is waited for."""
    blocking = [receive(1, 0, 1), send(1, 0, 1, site=BACKWARD)], [receive(0, 0, 1), send(0, 0, 1, site=BACKWARD)]
    (line,) = found(records(*blocking))
    assert "rank 0 waits in recv from rank 1 (pp: 0, 1) at send_forward.py:1 in forward for rank 1" in line
    batched = [[dataclasses.replace(made, site=FORWARD) for made in calls] for calls in blocking]
    assert found(records(*batched)) == []
    posted = [[dataclasses.replace(made, awaited=1 - place) for place, made in enumerate(calls)] for calls in blocking]
    assert found(records(*posted)) == []


def test_a_ring_of_batched_sends_and_receives():
    ranks = (0, 1, 2, 3)
    calls = [[send((rank + 1) % 4, *ranks), receive((rank - 1) % 4, *ranks)] for rank in ranks]
    assert found(records(*calls)) == []


@pytest.mark.parametrize("awaited", [0, 1, 2])
def test_a_receive_is_waited_for_where_the_record_says(awaited):
    """Rank 1 sends behind the barrier: rank 0 may post its receive before it, and must wait for it behind it."""
    barrier = call("barrier", 0, 1)
    lines = found(records([receive(1, 0, 1, awaited=awaited), barrier], [barrier, send(0, 0, 1)]))
    assert bool(lines) == (awaited == 0)


def test_one_forward_one_backward_of_a_pipeline():
    """Megatron's schedule of three stages, four micro-batches, as its batched sends and receives wait."""
    ranks = (0, 1, 2)
    calls: list[list] = [[], [], []]
    for stage in ranks:
        warm_up, made = 2 - stage, calls[stage]
        take = [receive(stage - 1, *ranks)] if stage else []
        give = [send(stage + 1, *ranks)] if stage < 2 else []
        take_back = [receive(stage + 1, *ranks, site=BACKWARD)] if stage < 2 else []
        give_back = [send(stage - 1, *ranks, site=BACKWARD)] if stage else []
        tick = [call("barrier", stage, group="compute")]  # keeps batches apart, as computing does
        for _ in range(warm_up):
            made += take + tick + give
        made += take
        for step in range(4 - warm_up):
            made += tick + [dataclasses.replace(m, site=FORWARD) for m in give + take_back] + tick
            made += [dataclasses.replace(m, site=BACKWARD) for m in give_back + (take if step < 3 - warm_up else [])]
        for _ in range(warm_up):
            made += take_back + tick + give_back
    assert found(records(*calls)) == []
    lines = found(records(*calls[:2], calls[2][1:]))
    assert lines and "rank 1 waits in send to rank 2 (pp: 0, 1, 2)" in lines[0]


def test_sizes_of_a_send_and_its_receive():
    (line,) = found(records([send(1, 0, 1, size=64)], [receive(0, 0, 1, size=32, site=BACKWARD)]))
    assert line == (
        "step: rank 0 sends 64 bytes of float32, rank 1 expects 32 bytes of float32: "
        f"send to rank 1 (pp: 0, 1) at {FORWARD}, recv from rank 0 (pp: 0, 1) at {BACKWARD}"
    )


@pytest.mark.parametrize("skips", ["send", "recv"])
def test_a_send_without_its_receive(skips):
    calls = [[send(1, 0, 1)], [receive(0, 0, 1)]]
    calls[skips == "recv"] = []
    (line,) = found(records(*calls))
    waits = {"send": "rank 1 waits in recv from rank 0", "recv": "rank 0 waits in send to rank 1"}[skips]
    ends = {"send": "rank 0 sends nothing more", "recv": "rank 1 receives nothing more"}[skips]
    assert line == f"step: {waits} (pp: 0, 1) at {FORWARD}, {ends}"


def test_ends_on_different_communicators_do_not_meet():
    lines = found(records([send(1, 0, 1)], [dataclasses.replace(receive(0, 0, 1), group="world")]))
    assert len(lines) == 2
