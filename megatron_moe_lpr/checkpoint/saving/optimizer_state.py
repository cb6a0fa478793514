"""The distributed optimizer's state in the shapes of the parameters, without gathering it.

Megatron-Core saves either its flat buffers (`dp_reshardable`: a later run needs the same layout) or the shapes of
the parameters after gathering the state of a whole data-parallel group on every rank (`fully_reshardable`,
distrib_optimizer.py `sharded_param_state_fully_reshardable`). Here a rank's slice of a flattened parameter is saved as
the few rectangles it consists of, each at its offset in the whole tensor. Nothing is gathered or copied, the tensors on
disk are those of `fully_reshardable`, and a run at any layout reads the rectangles it needs.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

from megatron_moe_lpr.checkpoint.saving.weight_bits import join_bits, split_bits
from megatron_moe_lpr.megatron.overriding import replace

STATE_PREFIX = "optimizer.state"
WEIGHT = "fp32_param"
"""Name in the checkpoint of the optimizer's fp32 copy of a parameter."""
MASTER = "master_param"
"""Name of that copy, or of a part of its bits, in the state of an optimizer that keeps it itself."""


def install_local_shard_state(optimizer: MegatronOptimizer) -> None:
    """Replace the two methods by which Megatron's distributed optimizers save and load `fully_reshardable` state.

    The replacements `_local_shards` and `_load_local_shards` handle only this rank's slices.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            replace(
                part,
                sharded_param_state_fully_reshardable=functools.partial(_local_shards, part),
                load_parameter_state_from_fully_reshardable=functools.partial(_load_local_shards, part),
            )


def rectangles(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut elements `begin` to `end` of a flattened array of `shape` into rectangles, in order.

    Yields:
        Offsets and sizes of each rectangle, which is contiguous in memory; at most 2 * len(shape) - 1 rectangles.
    """
    if begin >= end:
        return
    if len(shape) <= 1:
        yield tuple(begin for _ in shape), tuple(end - begin for _ in shape)
        return
    row = math.prod(shape[1:])
    # The whole rows are those from `first` to before `last`.
    first, last = -(-begin // row), end // row
    if first > last:  # within one row
        yield from _in_row(shape, begin // row, begin % row, end - begin // row * row)
        return
    if begin < first * row:  # the end of the row before the whole rows
        yield from _in_row(shape, first - 1, begin - (first - 1) * row, row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if end > last * row:  # the beginning of the row behind them
        yield from _in_row(shape, last, 0, end - last * row)


def _in_row(
    shape: Sequence[int], index: int, begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Rectangles of elements `begin` to `end` of the row `index`."""
    for offsets, sizes in rectangles(shape[1:], begin, end):
        yield (index, *offsets), (1, *sizes)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A tensor of the checkpoint that holds consecutive elements of a flattened parameter."""

    tensor: ShardedTensor
    begin: int
    """Its first element in the flattened parameter."""


def _local_shards(
    optimizer: DistributedOptimizer,
    model_state: ShardedStateDict,
    is_loading: bool = False,
    metadata: dict[str, Any] | None = None,
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """Replaces DistributedOptimizer.sharded_param_state_fully_reshardable: this rank's slices, as views of the state.

    Returns:
        By index of the parameter and name of the state (`fp32_param`, `exp_avg`, ...): the rectangles of this rank.
    """
    kinds = (ShardedTensor, ShardedTensorFactory)
    entries = {entry.data: entry for entry in nested_values(model_state) if isinstance(entry, kinds)}
    state = {}
    for index, (parameter, span) in enumerate(_local_parameters(optimizer)):
        pieces = list(_pieces(entries[parameter], parameter))
        state[index] = {
            name: list(_cut(pieces, span, f"{STATE_PREFIX}.{name}", values))
            for name, values in _states(optimizer, parameter).items()
        }
    return state


def _local_parameters(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """Parameters with optimizer state on this rank, each with this rank's range of the flattened parameter."""
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, found in bucket["param_map"].items():
                    yield parameter, found["param"]


def _states(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """This rank's slices of the fp32 copy and of Adam's moments of a parameter, by their names in the checkpoint.

    The moments are views. So is the fp32 copy, unless the optimizer keeps only the bits that the parameter lacks.
    """
    shard, state = _inner_state(optimizer, parameter)
    # `step` does not have the parameter's shape; the parameter groups hold it.
    moments = {name: value for name, value in state.items() if name not in ("step", MASTER)}
    return {WEIGHT: _full_weight(shard, state.get(MASTER)), **moments}


def _inner_state(
    optimizer: DistributedOptimizer, parameter: torch.nn.Parameter
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This rank's slice of a parameter as the inner optimizer steps it, and what the inner optimizer keeps for it.

    As `DistributedOptimizer._get_main_param_and_optimizer_states`, without the fp32 copies of moments in bf16.
    """
    group, order = optimizer.model_param_group_index_map[parameter]
    shard = optimizer.optimizer.param_groups[group]["params"][order]
    return shard, optimizer.optimizer.state[shard]


def _full_weight(shard: torch.Tensor, master: torch.Tensor | None) -> torch.Tensor:
    """The fp32 weight of a slice.

    Args:
        master: what a precision-aware optimizer keeps: an fp32 weight or the 16 bits that a bf16 one lacks.
    """
    if master is None or shard.dtype == torch.float32:
        # FusedAdam makes a copy of fp32 weights too, as routers are, and never updates it.
        return shard.detach()
    return join_bits(shard.detach(), master) if master.dtype == torch.int16 else master


def _pieces(entry: ShardedTensor | ShardedTensorFactory, parameter: torch.nn.Parameter) -> Iterator[_Piece]:
    """A parameter's tensors in the checkpoint: the parameter, or what a factory cuts it into (gate and up)."""
    if isinstance(entry, ShardedTensor):
        yield _Piece(entry, 0)
        return
    # On the meta device a view takes no memory, and its storage offset still says where it begins.
    probe = torch.empty(parameter.shape, device="meta")
    for tensor in nested_values(entry.build_fn(entry.key, probe, entry.replica_id, None)):
        if tensor.data._base is not probe or not tensor.data.is_contiguous():
            raise NotImplementedError(f"{tensor.key}: not consecutive elements of the flattened parameter")
        yield _Piece(tensor, tensor.data.storage_offset())


def _cut(pieces: Sequence[_Piece], span: Any, prefix: str, values: torch.Tensor) -> Iterator[ShardedTensor]:
    """Cut one state of a parameter into rectangles of the checkpoint's tensors.

    Args:
        span: this rank's range of the flattened parameter.
        values: the state's elements in that range.
    """
    for piece in pieces:
        tensor, size = piece.tensor, math.prod(piece.tensor.local_shape)
        # The overlap of the piece with this rank's range, in elements of the flattened parameter.
        begin, end = max(span.start, piece.begin), min(span.end, piece.begin + size)
        position = begin - span.start
        # Axes in front that only the whole tensor has, such as layers or experts.
        leading = [0] * tensor.prepend_axis_num
        for offsets, sizes in rectangles(tensor.local_shape, begin - piece.begin, end - piece.begin):
            count = math.prod(sizes)
            place = [start + offset for start, offset in zip(tensor.global_offset, (*leading, *offsets), strict=True)]
            yield dataclasses.replace(
                tensor,
                key=f"{prefix}.{tensor.key}",
                data=values[position : position + count].view(sizes),
                dtype=values.dtype,
                local_shape=tuple(sizes),
                global_offset=tuple(place),
                axis_fragmentations=None,
                # Each rank of a data-parallel group holds other elements: no third number, since none is a copy.
                replica_id=tensor.replica_id[:2],
            )
            position += count


@torch.no_grad()
def _load_local_shards(optimizer: DistributedOptimizer, state: dict[int, dict[str, list[torch.Tensor]]]) -> None:
    """Replaces DistributedOptimizer.load_parameter_state_from_fully_reshardable.

    Args:
        state: as `_local_shards` returned it, with loaded tensors in place of the sharded ones.
    """
    for index, (parameter, _) in enumerate(_local_parameters(optimizer)):
        shard, kept = _inner_state(optimizer, parameter)
        for name, parts in state[index].items():
            loaded = torch.cat([tensor.reshape(-1).to(shard.device) for tensor in parts])
            if name == WEIGHT:
                _set_weight(shard, kept.get(MASTER), loaded)
                # On the host the weight that steps is another than the one that is kept, until the next step.
                inner = getattr(optimizer.optimizer, "param_to_inner_param", {}).get(shard)
                if inner is not None:
                    inner.data.copy_(loaded)
            else:
                kept[name].copy_(loaded)


def _set_weight(shard: torch.Tensor, master: torch.Tensor | None, full: torch.Tensor) -> None:
    """Set a slice of a parameter, and what the optimizer keeps of its fp32 weight, from that weight."""
    if master is not None and master.dtype == torch.int16 and shard.dtype == torch.bfloat16:
        upper, lower = split_bits(full)
        shard.copy_(upper)
        master.copy_(lower)
        return
    shard.copy_(full)
    if master is not None:
        master.copy_(full)
