"""Which rank writes a tensor that several ranks hold: each of them about the same bytes, decided without a message.

Megatron-Core's FullyParallelSaveStrategyWrapper sends the description of every rank's tensors to every rank of the
data-parallel group, and its search for the emptiest rank takes (number of ranks)^2 steps a tensor. But the ranks of a
data-parallel group hold the same tensors, except for experts, which the ranks of an expert-data-parallel group have in
common: each rank knows from its own list what the others hold, and all of them decide alike.
"""

import dataclasses
import heapq
import math
from collections.abc import Sequence

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor

from megatron_moe_lpr.model.configuration.parameter_kinds import is_expert_parallel_key


@dataclasses.dataclass(frozen=True)
class Holders:
    """The ranks that hold copies of the same tensors."""

    index: int
    """This rank's number among them."""
    count: int


def divide_copies(state: ShardedStateDict) -> None:
    """Choose for every tensor of which there are copies the rank that writes it: its `replica_id` becomes 0, others 1.

    A copy is known by a `replica_id` of three numbers, as Megatron-Core makes it: the first two are 0 in the group of
    ranks that writes the tensor, the third is the rank's number in that group. Tensors with another `replica_id` stay
    as they are.

    Args:
        state: sharded state of this rank, changed in place. Megatron's groups must exist.
    """
    divide_among([entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)], *_holders())


def divide_among(copies: Sequence[ShardedTensor], dense: Holders, experts: Holders) -> None:
    """As `divide_copies` of a rank's tensors, for the rank that `dense` and `experts` describe.

    Args:
        copies: changed in place.
        dense: the ranks that hold the rank's tensors apart from experts.
        experts: the ranks that hold its experts.
    """
    for holders, is_expert in ((dense, False), (experts, True)):
        own = [copy for copy in copies if is_expert_parallel_key(copy.key) == is_expert and _is_copy(copy, holders)]
        for copy, writer in zip(own, writers(own, holders.count), strict=True):
            copy.replica_id = int(writer != holders.index)


def writers(tensors: Sequence[ShardedTensor], count: int) -> list[int]:
    """Return for each tensor the number of the rank that writes it, from 0 to `count` - 1.

    The largest tensor goes first, each to the rank with the fewest bytes so far; ties are broken by key and offset, so
    that every rank that holds these tensors finds the same. Takes O(T log T + T log count) steps for T tensors.
    """
    order = sorted(range(len(tensors)), key=lambda place: _rank_of_size(tensors[place]))
    loads = [(0, number) for number in range(count)]
    chosen = [0] * len(tensors)
    for place in order:
        load, number = loads[0]
        chosen[place] = number
        heapq.heapreplace(loads, (load + _nbytes(tensors[place]), number))
    return chosen


def _holders() -> tuple[Holders, Holders]:
    """The ranks that hold this rank's tensors apart from experts, and those that hold its experts."""
    groups = (
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_expert_data_parallel_group(),
    )
    dense, experts = (Holders(dist.get_rank(group), dist.get_world_size(group)) for group in groups)
    return dense, experts


def _is_copy(tensor: ShardedTensor, holders: Holders) -> bool:
    return isinstance(tensor.replica_id, tuple) and tensor.replica_id == (0, 0, holders.index)


def _rank_of_size(tensor: ShardedTensor) -> tuple[int, str, tuple[int, ...]]:
    return -_nbytes(tensor), tensor.key, tuple(tensor.global_offset)


def _nbytes(tensor: ShardedTensor) -> int:
    return math.prod(tensor.local_shape) * tensor.dtype.itemsize
