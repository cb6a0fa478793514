"""What a rank really sends in a training step: every call of a process group, counted below torch.distributed.

The bytes of a call are those that the rank hands to others, each piece once for every rank that needs it: of a gather
its own piece for all others, of a reduction all pieces but its own, of an all-reduce both. A broadcast counts on its
source, a reduction to one rank on the others: a gather of unequal pieces, over gloo so many broadcasts, counts alike.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

KINDS = {
    "_TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "_TENSOR_AND_CONTEXT_PARALLEL_GROUP": "metadata",
    "_CONTEXT_PARALLEL_GROUP": "context",
    "_EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "_EXPERT_TENSOR_PARALLEL_GROUP": "expert_tensor",
    "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "metadata",
    "_DATA_PARALLEL_GROUP": "data",
    "_DATA_PARALLEL_GROUP_WITH_CP": "data",
    "_EXPERT_DATA_PARALLEL_GROUP": "expert_data",
    "_PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "_EMBEDDING_GROUP": "pipeline",
}
"""What travels over each of Megatron's groups; over all others, and the world, control."""
SCALAR = 3
"""Elements of what counts as control over whichever group."""


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Bytes that this rank sends in the block, by kind."""
    sent: Counter = Counter()
    kept = {name: vars(dist.ProcessGroup)[name] for name in METHODS}
    for name in METHODS:
        setattr(dist.ProcessGroup, name, _counting(name, getattr(dist.ProcessGroup, name), sent))
    try:
        yield sent
    finally:
        for name, method in kept.items():
            setattr(dist.ProcessGroup, name, method)


def _counting(name: str, original: Callable[..., Any], sent: Counter) -> Callable[..., Any]:
    def call(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
        for tensor, size in METHODS[name](group, *arguments, **options):
            if size:
                sent[_kind(name, group, tensor)] += size
        return original(group, *arguments, **options)

    return call


def _kind(name: str, group: dist.ProcessGroup, tensor: torch.Tensor) -> str:
    known = (kind for variable, kind in KINDS.items() if getattr(parallel_state, variable) is group)
    kind = next(known, "control")
    if name == "send" and group is dist.group.WORLD:
        # Between two stages Megatron sends one way over the world (p2p_communication.py `_p2p_ops`).
        return "pipeline"
    if kind == "tensor" and tensor.dtype == torch.int64:
        return "metadata"
    return "control" if kind != "metadata" and tensor.numel() <= SCALAR else kind


def _all_reduce(group, tensors, *_, **__):
    return [(tensor, 2 * tensor.nbytes * (group.size() - 1) / group.size()) for tensor in tensors]


def _all_gather(group, outputs, tensors, *_, **__):
    return [(tensor, tensor.nbytes * (group.size() - 1)) for tensor in tensors]


def _all_gather_one(group, output, tensor, *_, **__):
    return [(tensor, tensor.nbytes * (group.size() - 1))]


def _reduce_scatter(group, outputs, inputs, *_, **__):
    return [(piece, piece.nbytes * (rank != group.rank())) for rank, piece in enumerate(inputs[0])]


def _reduce_scatter_one(group, output, tensor, *_, **__):
    return [(tensor, tensor.nbytes - output.nbytes)]


def _reduce_scatter_many(group, outputs, tensors, *_, **__):
    return [(tensor, tensor.nbytes - output.nbytes) for output, tensor in zip(outputs, tensors, strict=True)]


def _all_to_all(group, output, tensor, output_splits, input_splits, *_, **__):
    own = int(input_splits[group.rank()]) if len(input_splits) else len(tensor) // group.size()
    return [(tensor, (len(tensor) - own) * tensor[:1].nbytes)]


def _broadcast(group, tensors, options, *_, **__):
    others = (group.size() - 1) * (options.rootRank == group.rank())
    return [(tensor, tensor.nbytes * others) for tensor in tensors]


def _reduce(group, tensors, options, *_, **__):
    return [(tensor, tensor.nbytes * (options.rootRank != group.rank())) for tensor in tensors]


def _send(group, tensors, *_, **__):
    return [(tensor, tensor.nbytes) for tensor in tensors]


def _unknown(*_, **__):
    raise NotImplementedError("a call that is not counted")


METHODS: dict[str, Callable[..., list[tuple[torch.Tensor, float]]]] = {
    "allreduce": _all_reduce,
    "allreduce_coalesced": _all_reduce,
    "allgather": _all_gather,
    "_allgather_base": _all_gather_one,
    "all_gather_single": _all_gather_one,
    "allgather_into_tensor_coalesced": _all_gather,
    "all_gather_single_coalesced": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "_reduce_scatter_base": _reduce_scatter_one,
    "reduce_scatter_single": _reduce_scatter_one,
    "reduce_scatter_tensor_coalesced": _reduce_scatter_many,
    "reduce_scatter_single_coalesced": _reduce_scatter_many,
    "alltoall_base": _all_to_all,
    "all_to_all_single": _all_to_all,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "send": _send,
    "alltoall": _unknown,
    "allgather_coalesced": _unknown,
    "gather": _unknown,
    "scatter": _unknown,
}
METHODS = {name: count for name, count in METHODS.items() if name in vars(dist.ProcessGroup)}
"""Those that this version of torch has."""
