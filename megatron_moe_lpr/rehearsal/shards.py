"""The pieces of tensors that ranks write into a checkpoint, as Megatron's planning distributes them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from megatron.core.dist_checkpointing.exchange_utils import _shard_size, distribute_shards_to_ranks
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id, _ShardId

from megatron_moe_lpr.checkpoint.saving.shard_writer import ShardFile


@dataclasses.dataclass(frozen=True)
class Shard:
    """A rectangle of a tensor, written by one rank."""

    rank: int
    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    """Of the rectangle."""
    element_bytes: int
    file: str = ""
    """Below the checkpoint's directory; empty: not planned yet."""

    @property
    def bytes(self) -> int:
        """Bytes of the rectangle's values."""
        return math.prod(self.sizes) * self.element_bytes

    @property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where the rectangle lies in the tensor."""
        return self.offsets, self.sizes


def state_shards(rank: int, tensors: Iterable[ShardedTensor]) -> list[Shard]:
    """The tensors of a rank's sharded state, as rectangles."""
    return [_shard(rank, tensor) for tensor in tensors]


def _shard(rank: int, tensor: ShardedTensor) -> Shard:
    # Axes in front that only the whole tensor has, such as layers or experts.
    sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    itemsize = tensor.dtype.itemsize
    return Shard(rank, tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), sizes, itemsize)


def file_shards(rank: int, files: Iterable[ShardFile]) -> list[Shard]:
    """What a rank's planned files hold: rectangles of tensors, and objects as wholes without dimensions."""
    found = []
    for file in files:
        for item, data in file.items:
            if item.tensor_data is None:
                found.append(Shard(rank, item.index.fqn, (), (), (), data.getbuffer().nbytes, file.name))
                continue
            chunk, itemsize = item.tensor_data.chunk, item.tensor_data.properties.dtype.itemsize
            shape, offsets, sizes = map(tuple, (item.tensor_data.size, chunk.offsets, chunk.sizes))
            found.append(Shard(rank, item.index.fqn, shape, offsets, sizes, itemsize, file.name))
    return found


def written_shards(states: Mapping[int, Sequence[ShardedTensor]], groups: Iterable[Sequence[int]]) -> list[Shard]:
    """The rectangles that each rank writes, of those that it holds.

    As Megatron's FullyParallelSaveStrategyWrapper decides it in each data-parallel group (fully_parallel.py
    `apply_saving_parallelization`, exchange_utils.py `determine_main_replica_uniform_distribution`), for all ranks in
    one process.

    Args:
        states: the tensors of each rank's sharded state by its rank, without values.
        groups: the data-parallel groups, which together have every rank of `states`.
    """
    written = []
    for group in groups:
        if len(group) == 1:
            kept = [tensor for tensor in states[group[0]] if is_main_replica(tensor.replica_id)]
            written += state_shards(group[0], kept)
            continue
        writers = _writers([states[rank] for rank in group])
        for place, rank in enumerate(group):
            kept = [tensor for tensor in states[rank] if writers.get(_sharded_tensor_shard_id(tensor)) == place]
            written += state_shards(rank, kept)
    return written


def _writers(states: Sequence[Sequence[ShardedTensor]]) -> dict[_ShardId, int]:
    """By shard the place in a data-parallel group of the rank that writes it; shards of which another group holds the
    main copy are left out."""
    holders: dict[_ShardId, list[int]] = {}
    sizes: dict[_ShardId, int] = {}
    main: set[_ShardId] = set()
    for place, tensors in enumerate(states):
        for tensor in tensors:
            shard = _sharded_tensor_shard_id(tensor)
            holders.setdefault(shard, []).append(place)
            sizes.setdefault(shard, _shard_size(tensor))
            if is_main_replica(tensor.replica_id):
                main.add(shard)
    holders = {shard: places for shard, places in holders.items() if shard in main}
    return distribute_shards_to_ranks(holders, sizes, len(states), set())
