"""Devices and their memory, for code that needs no chosen platform or works on both."""

import resource

import torch

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform import Platform


def visible_device() -> torch.device:
    """The first GPU that PyTorch finds, else the CPU; no platform is chosen."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(name: str) -> torch.device:
    """The device of a `--device` flag.

    Raises:
        UserError: PyTorch does not know the device, or this machine has none.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), "unknown")
        raise UserError(f"--device {name}: cannot be used here ({reason})") from None


def parameter_device(on_host: bool) -> torch.device:
    """Where a parameter is made: on the host, or on this rank's GPU."""
    return torch.device("cpu") if on_host else torch.device(torch.cuda.current_device())


def peak_memory_gigabytes(platform: Platform) -> float:
    """Peak memory of this rank in GB: of the device, or on a CPU of the process."""
    if platform.on_gpus:
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
