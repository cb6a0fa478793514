"""What the processor of this machine can do."""

import torch

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""torch's names of what multiplies bfloat16: two of x86-64, two of ARM."""


def multiplies_bf16() -> bool:
    """Whether it has instructions for products in bfloat16."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older versions of torch know x86-64 alone
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in BF16_INSTRUCTIONS)
