"""fp32 weights as bf16 weights and the 16 bits that these lack."""

import struct

import torch

from megatron_moe_lpr.checkpoint.saving.weight_bits import join_bits, split_bits

TIES = [0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF, 0x3F808001, 0x00008000, 0x7F7F8000, 0, 0x80000000]
"""Halfway between two bf16 numbers and beside, a denormal one, one that rounds to infinity, and both zeros."""


def numbers() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    special = [struct.unpack("<f", struct.pack("<I", bits))[0] for bits in TIES]
    return torch.cat([torch.tensor(special), torch.randn(1000, generator=generator)])


def test_both_halves_together_are_every_bit():
    full = numbers()
    upper, lower = split_bits(full)
    assert (upper.dtype, lower.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_bits(upper, lower).view(torch.int32), full.view(torch.int32))


def test_the_upper_half_is_the_rounded_number():
    """torch rounds halves to even, the kernel upwards."""
    full = numbers()[len(TIES) :]
    assert torch.equal(split_bits(full)[0], full.bfloat16())
    assert split_bits(torch.tensor([1.00390625]))[0].item() == 1.0078125  # 1 + 1/256, halfway between 1 and 1 + 1/128
