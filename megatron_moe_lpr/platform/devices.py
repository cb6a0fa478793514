"""Questions to the device that do not wait for a platform to be chosen, or hold on both."""

import resource

import torch

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform import CPUFacts, Platform

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""torch's names of what multiplies bfloat16: two of x86-64, two of ARM."""


def visible_device() -> torch.device:
    """The first GPU that PyTorch sees, else the CPU; chooses no platform."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_facts() -> CPUFacts:
    """Ask the processor."""
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.11
        return CPUFacts(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    capabilities = torch.cpu.get_capabilities()
    return CPUFacts(any(capabilities.get(name) for name in BF16_INSTRUCTIONS))


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
