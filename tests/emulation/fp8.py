"""FP8 numbers: real torch.float8 values, kept as bytes as on the device, and scales that bring values into range."""

import torch

from tests.emulation.names import TORCH_DTYPE, DType

LARGEST = {DType.kFloat8E4M3: 448.0, DType.kFloat8E5M2: 57344.0}
NOT_A_NUMBER = 255
"""A byte that is NaN in either format."""


def encode(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Scaled values to bytes; beyond the range they saturate, as the hardware's conversion does."""
    limit = LARGEST[DType(dtype)]
    return values.float().clamp(-limit, limit).to(TORCH_DTYPE[DType(dtype)]).view(torch.uint8)


def decode(data: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Bytes to fp32, still scaled."""
    return data.view(TORCH_DTYPE[DType(dtype)]).float()


def scale_for(amax: torch.Tensor, dtype: DType, power_of_two: bool, epsilon: float) -> torch.Tensor:
    """Factor that brings the largest magnitude to the format's largest number.

    Mirrors common/recipe/recipe_common.cuh `compute_scale_from_amax`: 1 where there is nothing to scale, the largest
    float where the quotient overflows, rounded down to a power of two on demand.
    """
    amax = amax.float().clamp(min=epsilon) if epsilon else amax.float()
    usable = (amax > 0) & torch.isfinite(amax)
    # A tensor divided by a tensor: of a number torch takes the reciprocal first, and rounds twice.
    scale = torch.where(usable, torch.full_like(amax, LARGEST[DType(dtype)]) / amax, torch.ones_like(amax))
    scale = torch.where(torch.isinf(scale), torch.full_like(scale, torch.finfo(torch.float32).max), scale)
    if not power_of_two:
        return scale
    return torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)


def transposed(data: torch.Tensor) -> torch.Tensor:
    """[..., n] as a contiguous [n, ...]."""
    last = data.shape[-1]
    return data.reshape(-1, last).t().contiguous().view(last, *data.shape[:-1])
