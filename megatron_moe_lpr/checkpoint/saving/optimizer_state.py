"""The distributed optimizer's state in the parameters' own shapes, each rank's share written where it lies.

Megatron-Core offers either its flat buffers as they are (`dp_reshardable`: a later run needs the same layout) or
the parameters' shapes after gathering the state of a whole data-parallel group onto every rank (`fully_reshardable`,
distrib_optimizer.py `sharded_param_state_fully_reshardable`). Here a rank's slice of a flattened parameter is written
as the few rectangles it consists of, each at its place in the whole tensor. Nothing is gathered or copied, the tensors
on disk are those of `fully_reshardable`, and any layout reads the part it needs.
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

from megatron_moe_lpr.megatron.overriding import replace

STATE_PREFIX = "optimizer.state"
WEIGHT = "fp32_param"
"""The checkpoint's name of the optimizer's own copy of a parameter."""


def keep_shares_apart(optimizer: MegatronOptimizer) -> None:
    """Let the distributed optimizers in a chain save and load their state without gathering it."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            replace(
                part,
                sharded_param_state_fully_reshardable=functools.partial(_sharded_shares, part),
                load_parameter_state_from_fully_reshardable=functools.partial(_load_shares, part),
            )


def rectangles(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut elements `begin` to `end` of a flattened array into rectangles, in order.

    Yields:
        Offsets and sizes of each: at most 2 * len(shape) - 1 of them, each one contiguous run of the flattened array.
    """
    if begin >= end:
        return
    if len(shape) <= 1:
        yield tuple(begin for _ in shape), tuple(end - begin for _ in shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row
    if first > last:
        yield from _in_row(shape, begin // row, begin % row, end - begin // row * row)
        return
    if begin < first * row:
        yield from _in_row(shape, first - 1, begin - (first - 1) * row, row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if end > last * row:
        yield from _in_row(shape, last, 0, end - last * row)


def _in_row(shape: Sequence[int], index: int, begin: int, end: int):
    for offsets, sizes in rectangles(shape[1:], begin, end):
        yield (index, *offsets), (1, *sizes)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A tensor of the checkpoint that holds a run of a flattened parameter."""

    tensor: ShardedTensor
    begin: int


def _sharded_shares(
    optimizer: DistributedOptimizer,
    model_state: ShardedStateDict,
    is_loading: bool = False,
    metadata: dict[str, Any] | None = None,
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """Instead of DistributedOptimizer.sharded_param_state_fully_reshardable: this rank's share, as views."""
    kinds = (ShardedTensor, ShardedTensorFactory)
    of_parameter = {base.data: base for base in nested_values(model_state) if isinstance(base, kinds)}
    state = {}
    for index, (parameter, span) in enumerate(_local_parameters(optimizer)):
        pieces = list(_pieces(of_parameter[parameter], parameter))
        state[index] = {
            name: list(_cut(optimizer, pieces, span, f"{STATE_PREFIX}.{name}", values))
            for name, values in _states(optimizer, parameter).items()
        }
    return state


def _local_parameters(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """Parameters of which this rank holds the optimizer's state, each with its range of the flattened parameter."""
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, found in bucket["param_map"].items():
                    yield parameter, found["param"]


def _states(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    tensors = dict(optimizer._get_main_param_and_optimizer_states(parameter))
    # `step` is no tensor of the parameter's shape; it is kept with the parameter groups.
    tensors.pop("step", None)
    return {WEIGHT: tensors.pop("param"), **tensors}


def _pieces(base: ShardedTensor | ShardedTensorFactory, parameter: torch.nn.Parameter) -> Iterator[_Piece]:
    """A parameter's tensors in the checkpoint: itself, or those that a factory cuts it into (gate and up)."""
    if isinstance(base, ShardedTensor):
        yield _Piece(base, 0)
        return
    # On `meta` a view still tells where in its base it begins, and costs nothing.
    probe = torch.empty(parameter.shape, device="meta")
    for tensor in nested_values(base.build_fn(base.key, probe, base.replica_id, None)):
        if tensor.data._base is not probe or not tensor.data.is_contiguous():
            raise NotImplementedError(f"{tensor.key}: not a run of the flattened parameter")
        yield _Piece(tensor, tensor.data.storage_offset())


def _cut(
    optimizer: DistributedOptimizer, pieces: Sequence[_Piece], span: Any, prefix: str, values: torch.Tensor
) -> Iterator[ShardedTensor]:
    """Rectangles of `values`, the part `span` of one state of a flattened parameter."""
    for piece in pieces:
        tensor, size = piece.tensor, math.prod(piece.tensor.local_shape)
        begin, end = max(span.start, piece.begin), min(span.end, piece.begin + size)
        position = begin - span.start
        prepended = tensor.prepend_axis_num
        for offsets, sizes in rectangles(tensor.local_shape, begin - piece.begin, end - piece.begin):
            count = math.prod(sizes)
            place = [
                start + offset for start, offset in zip(tensor.global_offset, (*[0] * prepended, *offsets), strict=True)
            ]
            yield dataclasses.replace(
                tensor,
                key=f"{prefix}.{tensor.key}",
                data=values[position : position + count].view(sizes),
                dtype=values.dtype,
                local_shape=tuple(sizes),
                global_offset=tuple(place),
                axis_fragmentations=None,
                # Each rank of a data-parallel group holds other elements: none of them is a copy.
                replica_id=(*tensor.replica_id[:2], optimizer.distributed_optimizer_instance_id),
            )
            position += count


@torch.no_grad()
def _load_shares(optimizer: DistributedOptimizer, state: dict[int, dict[str, list[torch.Tensor]]]) -> None:
    """The reverse, with what was loaded in the place of the sharded tensors."""
    for index, (parameter, _) in enumerate(_local_parameters(optimizer)):
        for name, values in _states(optimizer, parameter).items():
            loaded = [tensor.reshape(-1).to(values.device) for tensor in state[index][name]]
            values.copy_(torch.cat(loaded) if len(loaded) > 1 else loaded[0])
