"""Differences between NCCL and gloo that callers of collectives must know."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist


def collective_device() -> torch.device:
    """The device on which a tensor must lie for a collective over all ranks."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def is_collective_failure(error: BaseException | None) -> bool:
    """Whether a collective failed because another rank ended or took too long; gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    """Initialise torch.distributed for this process alone while the block runs, unless it is initialised; no device."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
