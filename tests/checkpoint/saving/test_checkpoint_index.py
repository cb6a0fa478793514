"""The index of all ranks' shards: gathered once, written in each save, and refused where slices do not fit."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_moe_lpr.checkpoint.format.reader import CheckpointReader
from megatron_moe_lpr.checkpoint.saving.checkpoint_index import check_same_tensors
from megatron_moe_lpr.checkpoint.saving.saver import CheckpointSaver
from megatron_moe_lpr.errors import UserError
from tests.distributed import rank_pool

RANKS, ROWS = 2, 10


def rows_of_rank(extra: int = 0, name: str = "rows") -> dict:
    """Each rank's half of a tensor; with `extra`, rank 1's half is that of rank 0."""
    half = dist.get_rank() if not extra else 0
    values = torch.full((ROWS, 4), float(dist.get_rank()))
    tensor = ShardedTensor.from_rank_offsets(name, values, (0, half, RANKS), replica_id=0)
    return {name: tensor, "counters": {"iteration": 1}}


def save_often(root) -> list:
    """Save four times, the third with another tensor; count the values gathered on rank 0 in each."""
    saver, counts, gathered = CheckpointSaver(root, asynchronous=False), [], []
    original = dist.gather_object
    dist.gather_object = lambda value, *rest, **options: (gathered.append(value), original(value, *rest, **options))
    try:
        for iteration, name in enumerate(("rows", "rows", "others", "others"), start=1):
            gathered.clear()
            side_files = lambda directory: (directory / "moe_lpr").mkdir(exist_ok=True)  # noqa: E731
            saver.start(iteration, rows_of_rank(name=name), {}, side_files)
            counts.append(len(gathered))
    finally:
        dist.gather_object = original
        saver.close()
    return counts


def test_later_saves_gather_only_checksums(tmp_path):
    """Plans and places go to rank 0 where they are new; without that each save repeats them for all ranks' tensors."""
    assert rank_pool(RANKS).run(save_often, tmp_path) == [[3, 1, 3, 1]] * RANKS
    for iteration, name in enumerate(("rows", "rows", "others", "others"), start=1):
        read = CheckpointReader(tmp_path / f"iter_{iteration:07d}").read(name)
        assert torch.equal(read, torch.arange(float(RANKS)).repeat_interleave(ROWS)[:, None].expand(-1, 4))


def save_twice_the_same_half(root, asynchronous: bool) -> list[str]:
    """Two saves in which both ranks hold the first half of a tensor, and one as it should be."""
    saver, errors = CheckpointSaver(root, asynchronous), []
    try:
        for iteration, extra in ((1, 1), (2, 1), (3, 0)):
            side_files = lambda directory: (directory / "moe_lpr").mkdir(exist_ok=True)  # noqa: E731
            try:
                saver.start(iteration, rows_of_rank(extra), {}, side_files)
                saver.wait()
            except UserError as error:
                errors.append(str(error))
    finally:
        saver.close()
    return errors


@pytest.mark.parametrize("asynchronous", [True, False])
def test_slices_that_do_not_make_up_a_tensor_are_refused_on_every_rank(asynchronous, tmp_path):
    found = rank_pool(RANKS).run(save_twice_the_same_half, tmp_path, asynchronous)
    assert found[0] == found[1] and len(found[0]) == 2
    assert all("was not written: " in line and "rows" in line for line in found[0])
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000003"]


def item(dtype: torch.dtype, size: int) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size([size]))
    return WriteItem(MetadataIndex("rows", chunk.offsets), WriteItemType.SHARD, tensor_data=data)


@pytest.mark.parametrize("other", [item(torch.float16, 4), item(torch.float32, 6)])
def test_ranks_that_differ_in_shape_or_dtype_are_named(other):
    same = SavePlan([item(torch.float32, 4)])
    check_same_tensors([same, same])
    with pytest.raises(ValueError, match=r"^rows: .* on rank 0, .* on rank 2$"):
        check_same_tensors([same, same, SavePlan([other])])
