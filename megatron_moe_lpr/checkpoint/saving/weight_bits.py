"""fp32 weights in two halves, as an optimizer keeps them whose bf16 weights already hold the upper half."""

import torch


def join_bits(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """The fp32 numbers of which Transformer Engine's FusedAdam keeps the upper 16 bits, rounded, as bf16 and the lower
    16 bits as int16 (common/multi_tensor/adam.cu `AdamFunctorMasterParamRemainder`).

    Args:
        upper: bfloat16, rounded up where `lower` is negative.
        lower: int16, of the same shape.
    """
    high = upper.contiguous().view(torch.int16).to(torch.int32) - (lower < 0).to(torch.int32)
    return ((high << 16) | (lower.to(torch.int32) & 0xFFFF)).view(torch.float32)


def split_bits(full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `join_bits`: fp32 numbers as bfloat16 and the int16 of their lower 16 bits."""
    bits = full.contiguous().view(torch.int32)
    lower = bits.to(torch.int16)
    upper = ((bits >> 16) + (lower < 0).to(torch.int32)).to(torch.int16)
    return upper.view(torch.bfloat16), lower
