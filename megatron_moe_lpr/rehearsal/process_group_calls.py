"""What each method of torch.distributed's `ProcessGroup` is asked to send, from its arguments."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Call:
    """A collective as a method of `ProcessGroup` was asked for it."""

    kind: str
    tensors: Sequence[torch.Tensor] = ()
    """What the rank hands in, or is to receive."""
    sizes: Sequence[int] | None = None
    received: Sequence[int] | None = None
    peer: int | None = None
    """Rank in the group."""
    fills: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    """Tensors to fill, each with what this rank itself has handed in."""


def _splits(tensor: torch.Tensor, splits: Sequence[int], size: int) -> list[int]:
    """Elements of each rank's part, from its rows; without numbers of rows the parts are equal."""
    row = tensor[:1].numel() if len(tensor) else tensor.numel()
    rows = [int(count) for count in splits] if len(splits) else [len(tensor) // size] * size
    if len(tensor) == 0:
        return [0] * size
    return [count * row for count in rows]


def _all_reduce(group: Any, tensors: list[torch.Tensor], *_: Any, **__: Any) -> Call:
    return Call("all_reduce", tensors)


def _all_gather(group: Any, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], *_: Any, **__: Any) -> Call:
    pairs = [(target, source) for targets, source in zip(outputs, inputs, strict=True) for target in targets]
    return Call("all_gather", inputs, fills=pairs)


def _all_gather_one(group: Any, output: torch.Tensor, source: torch.Tensor, *_: Any, **__: Any) -> Call:
    return _all_gather_many(group, [output], [source])


def _all_gather_many(group: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], *_: Any, **__: Any) -> Call:
    pairs = [
        (part, source.reshape(-1))
        for output, source in zip(outputs, inputs, strict=True)
        for part in output.reshape(group.size(), -1)
    ]
    return Call("all_gather", inputs, fills=pairs)


def _reduce_scatter(
    group: Any, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], *_: Any, **__: Any
) -> Call:
    own = [(output, parts[group.rank()]) for output, parts in zip(outputs, inputs, strict=True)]
    return Call("reduce_scatter", [part for parts in inputs for part in parts], fills=own)


def _reduce_scatter_one(group: Any, output: torch.Tensor, source: torch.Tensor, *_: Any, **__: Any) -> Call:
    return _reduce_scatter_many(group, [output], [source])


def _reduce_scatter_many(
    group: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], *_: Any, **__: Any
) -> Call:
    own = [
        (output.reshape(-1), source.reshape(group.size(), -1)[group.rank()])
        for output, source in zip(outputs, inputs, strict=True)
        if output.data_ptr() != source.reshape(group.size(), -1)[group.rank()].data_ptr()
    ]
    return Call("reduce_scatter", inputs, fills=own)


def _all_to_all_one(
    group: Any,
    output: torch.Tensor,
    source: torch.Tensor,
    output_splits: Sequence[int] = (),
    input_splits: Sequence[int] = (),
    *_: Any,
    **__: Any,
) -> Call:
    size = group.size()
    sent, received = _splits(source, input_splits, size), _splits(output, output_splits, size)
    return Call("all_to_all", [source], sent, received, fills=[(output, source)])


def _all_to_all(group: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], *_: Any, **__: Any) -> Call:
    sent, received = ([tensor.numel() for tensor in tensors] for tensors in (inputs, outputs))
    return Call("all_to_all", inputs, sent, received, fills=list(zip(outputs, inputs, strict=True)))


def _broadcast(group: Any, tensors: list[torch.Tensor], options: Any, *_: Any, **__: Any) -> Call:
    return Call("broadcast", tensors, peer=options.rootRank)


def _reduce(group: Any, tensors: list[torch.Tensor], options: Any, *_: Any, **__: Any) -> Call:
    return Call("reduce", tensors, peer=options.rootRank)


def _gather(group: Any, outputs: list, inputs: list[torch.Tensor], options: Any, *_: Any, **__: Any) -> Call:
    pairs = [(target, source) for targets, source in zip(outputs, inputs, strict=False) for target in targets]
    return Call("gather", inputs, peer=options.rootRank, fills=pairs)


def _scatter(group: Any, outputs: list[torch.Tensor], inputs: list, options: Any, *_: Any, **__: Any) -> Call:
    return Call("scatter", outputs, peer=options.rootRank)


def _send(group: Any, tensors: list[torch.Tensor], peer: int, *_: Any, **__: Any) -> Call:
    return Call("send", tensors, peer=peer)


def _receive(group: Any, tensors: list[torch.Tensor], peer: int, *_: Any, **__: Any) -> Call:
    return Call("recv", tensors, peer=peer)


def _barrier(group: Any, *_: Any, **__: Any) -> Call:
    return Call("barrier")


METHODS: dict[str, Callable[..., Call]] = {
    "allreduce": _all_reduce,
    "allreduce_coalesced": _all_reduce,
    "allgather": _all_gather,
    "allgather_coalesced": _all_gather,
    "_allgather_base": _all_gather_one,
    "all_gather_single": _all_gather_one,
    "allgather_into_tensor_coalesced": _all_gather_many,
    "all_gather_single_coalesced": _all_gather_many,
    "reduce_scatter": _reduce_scatter,
    "_reduce_scatter_base": _reduce_scatter_one,
    "reduce_scatter_single": _reduce_scatter_one,
    "reduce_scatter_tensor_coalesced": _reduce_scatter_many,
    "reduce_scatter_single_coalesced": _reduce_scatter_many,
    "alltoall_base": _all_to_all_one,
    "all_to_all_single": _all_to_all_one,
    "alltoall": _all_to_all,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "gather": _gather,
    "scatter": _scatter,
    "send": _send,
    "recv": _receive,
    "barrier": _barrier,
    "monitored_barrier": _barrier,
}
"""By method of `ProcessGroup`: what the call is. Versions of torch have some of them under other names."""
