"""The distributed optimizer's buffers over gloo: ranks send each other their pieces, and copy nothing of their own.

torch reduces and scatters over gloo by summing a copy of the whole on every rank. On a single rank the piece is the
whole, and there is nothing to do.
"""

import functools
from collections.abc import Callable
from typing import Any

import megatron.core.distributed.param_and_grad_buffer as param_and_grad_buffer
import torch
import torch.distributed as dist

from megatron_moe_lpr.megatron.overriding import replace


def _others(group: dist.ProcessGroup) -> list[int]:
    return [rank for rank in range(group.size()) if rank != group.rank()]


def _wait_for(requests: list[dist.Work | None]) -> None:
    for request in requests:
        # None: this rank is no member of the group.
        if request is not None:
            request.wait()


def _reduce_scatter(piece: torch.Tensor, buffer: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Sum the ranks' pieces in the order of the ranks, so that it is the same whichever rank owns them."""
    pieces, others = buffer.view(group.size(), -1), _others(group)
    received = {rank: torch.empty_like(piece) for rank in others}
    requests = [dist.irecv(received[rank], group=group, group_src=rank) for rank in others]
    requests += [dist.isend(pieces[rank], group=group, group_dst=rank) for rank in others]
    _wait_for(requests)
    ordered = [received.get(rank, piece) for rank in range(group.size())]
    torch.add(functools.reduce(torch.add, ordered[:-1]), ordered[-1], out=piece)


def _all_gather(buffer: torch.Tensor, piece: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Fill the buffer with the ranks' pieces; this rank's lies in it."""
    pieces, others = buffer.view(group.size(), -1), _others(group)
    requests = [dist.irecv(pieces[rank], group=group, group_src=rank) for rank in others]
    requests += [dist.isend(piece, group=group, group_dst=rank) for rank in others]
    _wait_for(requests)


def _is_piece(piece: torch.Tensor, buffer: torch.Tensor, group: dist.ProcessGroup) -> bool:
    """Whether it is this rank's part of the buffer, in place."""
    whole = piece.numel() * group.size() == buffer.numel()
    return whole and piece.data_ptr() == buffer.view(group.size(), -1)[group.rank()].data_ptr()


def _in_place(
    exchange: Callable[[torch.Tensor, torch.Tensor, dist.ProcessGroup], None],
    original: Callable[..., Any],
    buffer_first: bool,
) -> Callable[..., Any]:
    """Megatron's call answered by `exchange`, where it is for a sum, at once, and in place."""

    @functools.wraps(original)
    def collective(
        output: torch.Tensor,
        source: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
        op: Any = dist.ReduceOp.SUM,
    ) -> Any:
        piece, buffer = (source, output) if buffer_first else (output, source)
        if async_op or op != dist.ReduceOp.SUM or not _is_piece(piece, buffer, group):
            reduction = {} if buffer_first else {"op": op}
            return original(output, source, group=group, async_op=async_op, **reduction)
        if group.size() > 1:
            exchange(output, source, group)
        return None

    return collective


def install() -> None:
    """param_and_grad_buffer.py `start_grad_sync`, `start_param_sync`."""
    module = param_and_grad_buffer
    replace(
        module,
        dist_reduce_scatter_func=_in_place(_reduce_scatter, module.dist_reduce_scatter_func, False),
        dist_all_gather_func=_in_place(_all_gather, module.dist_all_gather_func, True),
    )
