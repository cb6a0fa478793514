"""Capabilities of this machine's processor."""

import torch

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""torch's names of instruction sets that multiply bfloat16: two of x86-64, two of ARM."""


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for products in bfloat16."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older versions of torch detect x86-64 only
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in BF16_INSTRUCTIONS)
