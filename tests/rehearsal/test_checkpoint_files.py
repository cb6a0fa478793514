"""Files and shards of a save: planted faults are named, and a save writes every element once."""

import dataclasses

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_moe_lpr.checkpoint.saving.optimizer_state import rectangles
from megatron_moe_lpr.rehearsal.checkpoint_files import check_files, check_shards, total_bytes
from megatron_moe_lpr.rehearsal.record import RankRecord
from megatron_moe_lpr.rehearsal.shards import Shard, state_shards, written_shards

ROWS = [Shard(rank, "rows", (8, 4), (2 * rank, 0), (2, 4), 4, f"__{rank}_0.distcp") for rank in range(4)]


def lines(written: list[Shard], *further, **options) -> list[str]:
    return [str(finding) for finding in check_shards(written, *further, **options)]


def changed(rank: int, **values) -> list[Shard]:
    return [dataclasses.replace(shard, **values) if shard.rank == rank else shard for shard in ROWS]


def test_parts_that_make_up_a_tensor():
    scalar = Shard(0, "scalar", (), (), (), 8)
    assert lines([*ROWS, scalar]) == [] and total_bytes([*ROWS, scalar]) == 8 * 4 * 4 + 8


@pytest.mark.parametrize(
    ("offsets", "places"), [((1, 0), "[0:2, 0:4] and [1:3, 0:4]"), ((0, 0), "[0:2, 0:4]"), ((1, 3), None)]
)
def test_an_overlap_is_named(offsets, places):
    """Rank 1 writes rows of rank 0's; with columns beyond the tensor's it is outside."""
    found = lines(changed(1, offsets=offsets))
    if places is None:
        assert found == ["save: tensor rows [8, 4] of 4 bytes each: rank 1 writes [1:3, 3:7] of it"]
    else:
        expected = f"save: tensor rows [8, 4] of 4 bytes each: ranks 0 and 1 write the same elements, {places}"
        assert found == [expected]


def test_a_hole_is_named():
    (line,) = lines([shard for shard in ROWS if shard.rank != 2])
    assert line == (
        "save: tensor rows [8, 4] of 4 bytes each: 8 of 32 elements are written by no rank; ranks 0, 1, 3 write the "
        "others"
    )
    assert lines(ROWS[:2], ranks_missing=True) == []
    assert lines([], ROWS) == ["save: tensor rows is written by no rank"]
    assert lines([], ROWS, ranks_missing=True) == []


def test_an_overlap_that_hides_a_hole():
    """As many elements as the tensor has, but not each once."""
    assert "ranks 0 and 1 write the same elements" in lines(changed(1, offsets=(0, 0)))[0]


@pytest.mark.parametrize("values", [{"shape": (8, 5)}, {"element_bytes": 2}])
def test_ranks_that_mean_different_tensors(values):
    (line,) = lines(changed(3, **values))
    assert line.startswith("save: tensor rows: [8, 4] of 4 bytes each on rank 0, [") and line.endswith("on rank 3")


def test_every_pair_of_overlapping_rectangles_is_found():
    """Against a count of each element, on random rectangles in three dimensions."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        shards, counts = [], torch.zeros(6, 5, 4)
        for rank in range(4):
            ends = torch.stack([torch.randperm(size + 1, generator=generator)[:2].sort()[0] for size in counts.shape])
            shards.append(
                Shard(rank, "x", (6, 5, 4), *map(tuple, (ends[:, 0].tolist(), ends.diff()[:, 0].tolist())), 4)
            )
            counts[tuple(slice(*end) for end in ends.tolist())] += 1
        found = lines(shards, ranks_missing=True)
        assert bool(found) == bool((counts > 1).any())


def test_names_and_bytes_of_files():
    made = [RankRecord(rank, files=[(f"__{rank}_0.distcp", 32 + 300)]) for rank in range(4)]
    assert check_files(made) == check_files(made, ROWS) == []
    made[2].files = [("__1_0.distcp", 32)]
    found = [str(finding) for finding in check_files(made, ROWS)]
    assert found == [
        "save: file __1_0.distcp is written more than once: by ranks 1, 2",
        "save: rank 2 writes no file __2_0.distcp, which is to hold 1 tensors",
    ]
    made[2].files = [("__2_0.distcp", 31)]
    (line,) = map(str, check_files(made, ROWS))
    assert line == "save: rank 2 writes 31 bytes into __2_0.distcp, whose tensors have 32"


def states(tp: int, dp: int, ep: int) -> dict[int, list[ShardedTensor]]:
    """Every rank's tensors: weights split over TP with a copy on each DP rank, norms on all ranks, two experts on each
    EP rank, and the optimizer's state of the weights, split again over DP."""
    found = {}
    for rank in range(tp * dp):
        part, copy = rank % tp, rank // tp
        weight = ShardedTensor.from_rank_offsets("weight", torch.zeros(6, 4), (0, part, tp), replica_id=(0, 0, copy))
        norm = ShardedTensor.from_rank_offsets("norm", torch.zeros(7), replica_id=(0, part, copy))
        found[rank] = [weight, norm]
        for number in (2 * (rank % ep), 2 * (rank % ep) + 1):
            key = f"layer.mlp.experts.experts.{number}.weight"
            found[rank].append(
                ShardedTensor.from_rank_offsets(key, torch.zeros(3 + number, 4), replica_id=(0, 0, rank // ep))
            )
        begin, end = 24 * copy // dp, 24 * (copy + 1) // dp
        for offsets, sizes in rectangles((6, 4), begin, end):
            moment = dataclasses.replace(
                weight,
                key="moment",
                data=torch.zeros(sizes),
                local_shape=tuple(sizes),
                global_offset=(6 * part + offsets[0], offsets[1]),
                axis_fragmentations=None,
                replica_id=(0, 0),
            )
            found[rank].append(moment)
    return found


@pytest.mark.parametrize(("tp", "dp", "ep"), [(2, 5, 2), (2, 6, 4), (1, 6, 3), (1, 1, 1)])
def test_a_save_writes_every_element_once(tp, dp, ep):
    made = states(tp, dp, ep)
    groups = [[part + tp * copy for copy in range(dp)] for part in range(tp)]
    expert_groups = [list(range(first, tp * dp, ep)) for first in range(ep)]
    held = [shard for rank, tensors in made.items() for shard in state_shards(rank, tensors)]
    written = written_shards(made, groups, expert_groups)
    assert lines(written, held) == []
    experts = sum(3 + number for number in range(2 * ep)) * 4
    assert sum(shard.bytes for shard in written) == total_bytes(held) == 4 * (6 * tp * 4 + 7 + 6 * tp * 4 + experts)
    assert [tensor.replica_id for tensor in made[0][:2]] == [(0, 0, 0)] * 2
    # Copies that say they are the main ones, in both groups.
    for rank, tensors in made.items():
        tensors[1].replica_id = (0, 0, rank // tp)
    found = lines(written_shards(made, groups, expert_groups), held)
    assert len(found) == tp - 1
    assert all("tensor norm [7] of 4 bytes each: ranks " in line and "same elements, [0:7]" in line for line in found)
