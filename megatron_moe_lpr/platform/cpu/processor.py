"""What the processor of this machine can do."""

import torch

from megatron_moe_lpr.platform.facts import CPUFacts

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""torch's names of what multiplies bfloat16: two of x86-64, two of ARM."""


def cpu_facts() -> CPUFacts:
    """Ask the processor."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older versions of torch know x86-64 alone
        return CPUFacts(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    capabilities = torch.cpu.get_capabilities()
    return CPUFacts(any(capabilities.get(name) for name in BF16_INSTRUCTIONS))
