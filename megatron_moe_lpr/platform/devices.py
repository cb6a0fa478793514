"""Questions to the device that do not wait for a platform to be chosen, or hold on both."""

import resource

import torch

from megatron_moe_lpr.platform import Platform


def visible_device() -> torch.device:
    """The first GPU that PyTorch sees, else the CPU; chooses no platform."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_memory_gigabytes(platform: Platform) -> float:
    """Most memory this rank has held: the device's, or on a CPU the process's."""
    if platform.on_gpus:
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
