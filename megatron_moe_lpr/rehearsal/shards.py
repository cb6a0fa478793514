"""The pieces of tensors that ranks write into a checkpoint, as a save distributes them."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

from megatron_moe_lpr.checkpoint.saving.replicas import Holders, divide_among
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


def written_shards(
    states: Mapping[int, Sequence[ShardedTensor]],
    dense_groups: Iterable[Sequence[int]],
    expert_groups: Iterable[Sequence[int]],
) -> list[Shard]:
    """The rectangles that each rank writes, of those that it holds: as a save decides it on each rank by itself.

    Args:
        states: the tensors of each rank's sharded state by its rank, without values.
        dense_groups: the data-parallel groups, with context parallelism, which together have every rank of `states`.
        expert_groups: the expert-data-parallel groups, likewise.
    """
    dense, experts = _holders(dense_groups), _holders(expert_groups)
    written = []
    for rank, tensors in states.items():
        own = [copy.copy(tensor) for tensor in tensors]
        divide_among(own, dense[rank], experts[rank])
        written += state_shards(rank, [tensor for tensor in own if is_main_replica(tensor.replica_id)])
    return written


def _holders(groups: Iterable[Sequence[int]]) -> dict[int, Holders]:
    """By rank its place in its group."""
    return {rank: Holders(place, len(group)) for group in groups for place, rank in enumerate(group)}
