"""Which rank writes a tensor that several hold: each exactly once, evenly, and the same wherever it is decided."""

import random

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_moe_lpr.checkpoint.saving import replicas
from megatron_moe_lpr.checkpoint.saving.replicas import Holders, divide_copies, writers

RANKS, EXPERT_RANKS, EXPERT_PARALLEL = 6, 3, 2


def tensor(key: str, rows: int, replica_id) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.empty(rows, 4, device="meta"), replica_id=replica_id)


def state(rank: int) -> dict:
    """Of a rank that is one of six with the same dense tensors, and of three with the same experts."""
    index, ours = rank // EXPERT_PARALLEL, rank % EXPERT_PARALLEL
    dense = {
        f"decoder.layers.{n}.dense": tensor(f"decoder.layers.{n}.dense", 10 + 7 * n, (0, 0, rank)) for n in range(9)
    }
    keys = [f"decoder.layers.{n}.mlp.experts.experts.{ours}.weight" for n in range(7)]
    experts = {key: tensor(key, 30 + number, (0, 0, index)) for number, key in enumerate(keys)}
    # Not copies: of another TP rank's group, a piece of the optimizer's state, and what Megatron numbers otherwise.
    other = {
        "other": tensor("decoder.norm", 5, (0, 1, rank)),
        "piece": tensor(f"optimizer.state.exp_avg.{rank}", 5, (0, 0)),
        "single": tensor("single", 5, int(rank > 0)),
    }
    return dense | experts | other


def divided(rank: int, monkeypatch) -> dict[str, object]:
    holders = Holders(rank, RANKS), Holders(rank // EXPERT_PARALLEL, EXPERT_RANKS)
    monkeypatch.setattr(replicas, "_holders", lambda: holders)
    content = state(rank)
    items = list(content.items())
    random.Random(rank).shuffle(items)  # the order of a rank's own list decides nothing
    divide_copies(dict(items))
    return {name: entry.replica_id for name, entry in content.items()}


def test_each_tensor_is_written_once(monkeypatch):
    found = [divided(rank, monkeypatch) for rank in range(RANKS)]
    names = set().union(*found) - {"other", "piece", "single"}
    assert len(names) == 9 + 7 * EXPERT_PARALLEL
    for name in names:
        assert sorted(part[name] for part in found if name in part)[:2] == [0, 1], name
        assert sum(part[name] == 0 for part in found if name in part) == 1, name
    for rank, part in enumerate(found):
        assert (part["other"], part["piece"], part["single"]) == ((0, 1, rank), (0, 0), int(rank > 0))


def test_shares_are_as_a_plain_search_for_the_emptiest_rank_makes_them():
    sizes = [random.Random(1).randrange(1, 500) for _ in range(300)]
    copies = [tensor(f"t{number:03}", rows, (0, 0, 0)) for number, rows in enumerate(sizes)]
    loads = [0] * 7
    expected = {}
    for size, name in sorted(((rows * 16, copy.key) for rows, copy in zip(sizes, copies, strict=True)), key=by_size):
        expected[name] = loads.index(min(loads))
        loads[expected[name]] += size
    found = writers(copies, 7)
    assert {copy.key: writer for copy, writer in zip(copies, found, strict=True)} == expected
    assert max(loads) - min(loads) <= max(sizes) * 16


def by_size(pair: tuple[int, str]) -> tuple[int, str]:
    return -pair[0], pair[1]
