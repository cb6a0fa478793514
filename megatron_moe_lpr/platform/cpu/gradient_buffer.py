"""The distributed optimizer's buffers on a single data-parallel rank, whose piece is the whole."""

import functools
from collections.abc import Callable
from typing import Any

import megatron.core.distributed.param_and_grad_buffer as param_and_grad_buffer
import torch
import torch.distributed as dist


def _unless_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gloo copies a buffer twice to reduce or gather it in place."""

    @functools.wraps(original)
    def collective(output: torch.Tensor, source: torch.Tensor, group: Any, async_op: bool, **kwargs: Any) -> Any:
        if dist.get_world_size(group) == 1 and output.data_ptr() == source.data_ptr() and not async_op:
            return None
        return original(output, source, group=group, async_op=async_op, **kwargs)

    return collective


def install() -> None:
    """param_and_grad_buffer.py `start_grad_sync`, `start_param_sync`."""
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(param_and_grad_buffer, name, _unless_alone(getattr(param_and_grad_buffer, name)))
