"""What differs between NCCL and gloo for who calls collectives."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist


def collective_device() -> torch.device:
    """Where a tensor must lie for a collective over the world."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def is_collective_failure(error: BaseException | None) -> bool:
    """Whether a collective has failed because another rank ended or took too long; gloo has no type for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    """A world of this process alone, where there is none, without any device."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
