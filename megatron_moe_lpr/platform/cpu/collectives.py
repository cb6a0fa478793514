"""Collectives that gloo lacks: averages, and chunks of unequal size. One gloo device for all groups."""

import datetime
import functools
import os
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_lpr.megatron.overriding import replace


def _average_by_sum() -> None:
    """all_reduce(op=AVG), which distributed/finalize_model_grads.py and moe/moe_utils.py call."""
    original = dist.all_reduce

    @functools.wraps(original)
    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if op != dist.ReduceOp.AVG:
            return original(tensor, op, group, async_op)
        work = original(tensor, dist.ReduceOp.SUM, group, False)
        tensor /= dist.get_world_size(group)
        return work

    replace(dist, all_reduce=all_reduce)


def _gather_unequal_chunks() -> None:
    """all_gather with unequal sizes, for tensor_parallel/mappings.py `_gather_along_first_dim` (expert TP)."""
    original = dist.all_gather

    @functools.wraps(original)
    def all_gather(chunks: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({chunk.shape for chunk in chunks} | {tensor.shape}) == 1:
            return original(chunks, tensor, group, async_op)
        rank = dist.get_rank(group)
        for source, chunk in enumerate(chunks):
            received = (
                tensor.contiguous()
                if source == rank
                else torch.empty_like(chunk, memory_format=torch.contiguous_format)
            )
            dist.broadcast(received, group=group, group_src=source)
            chunk.copy_(received)
        return None

    replace(dist, all_gather=all_gather)


def _scatter_unequal_chunks() -> None:
    """reduce_scatter with unequal sizes, for tensor_parallel/mappings.py `_reduce_scatter_along_first_dim`."""
    original = dist.reduce_scatter

    @functools.wraps(original)
    def reduce_scatter(
        output: torch.Tensor,
        chunks: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({chunk.shape for chunk in chunks}) == 1:
            return original(output, chunks, op, group, async_op)
        rank = dist.get_rank(group)
        for target, chunk in enumerate(chunks):
            reduced = chunk.clone()
            dist.reduce(reduced, group=group, group_dst=target, op=op)
            if target == rank:
                output.copy_(reduced)
        return None

    replace(dist, reduce_scatter=reduce_scatter)


@functools.cache
def _devices() -> list[dist.ProcessGroupGloo.Device]:
    """The devices that ProcessGroupGloo's own constructor would make."""
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    if not names:
        return [dist.ProcessGroupGloo.create_default_device()]
    return [dist.ProcessGroupGloo.create_device(interface=name) for name in names.split(",")]


@functools.cache
def _share_devices() -> None:
    """Give all groups the same gloo devices: each is a thread that wakes a hundred times a second, and Megatron makes
    some twenty groups, most of a single rank."""
    original = dist.ProcessGroupGloo.__init__

    def init(
        self: dist.ProcessGroupGloo,
        store: dist.Store,
        rank: int,
        size: int,
        timeout: datetime.timedelta,
        **settings: bool,
    ) -> None:
        # torch's stubs lack the class that its own _new_process_group_helper uses.
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices, options._timeout = _devices(), timeout
        options._threads = 2 * len(options._devices)
        # From torch 2.14 on `enable_reconfigure`, an option of the same name.
        replace(options, **settings)
        original(self, store, rank, size, options)

    replace(dist.ProcessGroupGloo, __init__=init)


def install() -> None:
    """Add the missing collectives to torch.distributed; calls that gloo supports pass through unchanged."""
    _share_devices()
    _average_by_sum()
    _gather_unequal_chunks()
    _scatter_unequal_chunks()
