"""What other ranks of a group would describe where ranks describe the slices that they hold to each other.

Every other rank of a data-parallel group is taken to have the same weights as the rehearsed one, apart from experts: of
these it has those of its own place in the expert-parallel groups. Pieces of the optimizer's state are each rank's own.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_moe_lpr.checkpoint.saving.optimizer_state import STATE_PREFIX
from megatron_moe_lpr.model.configuration.parameter_kinds import is_expert_parallel_key

EXPERT = re.compile(r"(?<=\.mlp\.experts\.experts\.)\d+(?=\.)")
"""The number of an expert in a key."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Of a rank: what it holds."""

    copy: int
    """Which copy of the weights: its place in the data-parallel group."""
    expert_tp: int
    """Its place in the group that splits single experts."""
    ep: int
    """Its place in the expert-parallel group."""
    expert_copy: int
    """Which copy of its experts."""


def as_other_rank(value: Any, ranks: Sequence[int], own: int, other: int) -> Any:
    """What another rank of a group describes where this one describes `value`: lists of slices without data.

    Other values are returned as they are, and so is this rank's own. For slices Megatron's groups must exist.

    Args:
        ranks: the group's, a data-parallel one.
        own, other: places of the two ranks in the group.
    """
    if own == other or not isinstance(value, list) or not all(isinstance(one, ShardedTensor) for one in value):
        return value
    mine, theirs = _place(ranks, own), _place(ranks, other)
    held = _experts_held(value)
    return [_as_other(tensor, mine, theirs, held) for tensor in value]


def _place(ranks: Sequence[int], number: int) -> Place:
    """By the order in which Megatron numbers ranks: `world.ORDER`, for experts with sizes of their own."""
    expert_tp = parallel_state.get_expert_tensor_parallel_world_size()
    ep = parallel_state.get_expert_model_parallel_world_size()
    copies = parallel_state.get_expert_data_parallel_world_size()
    rank = ranks[number]
    return Place(number, rank % expert_tp, rank // expert_tp % ep, rank // (expert_tp * ep) % copies)


def _experts_held(tensors: Iterable[ShardedTensor]) -> dict[str, int]:
    """How many experts a rank holds, by key without the expert's number."""
    found = defaultdict(set)
    for tensor in tensors:
        if match := EXPERT.search(tensor.key):
            found[EXPERT.sub("", tensor.key)].add(match[0])
    return {key: len(numbers) for key, numbers in found.items()}


def _as_other(tensor: ShardedTensor, own: Place, other: Place, held: Mapping[str, int]) -> ShardedTensor:
    if tensor.key.startswith(STATE_PREFIX):
        return dataclasses.replace(tensor, key=f"{tensor.key} of {other.copy}")
    if is_expert_parallel_key(tensor.key):
        return _as_other_expert(tensor, own, other, held)
    *rest, copy = tensor.replica_id if isinstance(tensor.replica_id, tuple) else (tensor.replica_id,)
    # A weight's copy has the number of its data-parallel rank.
    return dataclasses.replace(tensor, replica_id=(*rest, other.copy if copy == own.copy else copy))


def _as_other_expert(tensor: ShardedTensor, own: Place, other: Place, held: Mapping[str, int]) -> ShardedTensor:
    """The slice of the expert that has the same place among those of the other rank."""
    further = (other.ep - own.ep) * held.get(EXPERT.sub("", tensor.key), 0)
    parts = tensor.axis_fragmentations or (1,) * len(tensor.global_offset)
    steps = [
        (other.expert_tp - own.expert_tp) * size if count > 1 else 0
        for size, count in zip(tensor.local_shape, parts, strict=True)
    ]
    pipeline, copy_in_tp, _ = tensor.replica_id
    if max(parts, default=1) == 1 and copy_in_tp == own.expert_tp:
        copy_in_tp = other.expert_tp
    return dataclasses.replace(
        tensor,
        key=EXPERT.sub(lambda number: str(int(number[0]) + further), tensor.key),
        global_offset=tuple(begin + step for begin, step in zip(tensor.global_offset, steps, strict=True)),
        replica_id=(pipeline, copy_in_tp, other.expert_copy),
    )
