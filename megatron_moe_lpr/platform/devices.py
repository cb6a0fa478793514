"""Questions to the device that do not wait for a platform to be chosen, or hold on both."""

import resource

import torch

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform import Platform


def visible_device() -> torch.device:
    """The first GPU that PyTorch sees, else the CPU; chooses no platform."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(name: str) -> torch.device:
    """The device of a `--device` flag.

    Raises:
        UserError: PyTorch knows no such device, or there is none here.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), "unknown")
        raise UserError(f"--device {name}: cannot be used here ({reason})") from None


def peak_memory_gigabytes(platform: Platform) -> float:
    """Most memory this rank has held: the device's, or on a CPU the process's."""
    if platform.on_gpus:
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
