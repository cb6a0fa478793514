"""FP8 numbers against their definition: every byte by sign, exponent and mantissa in float64."""

import pytest
import torch

from tests.emulation.builders import E4M3, E5M2, LARGEST
from tests.emulation.fp8 import decode, encode, scale_for, transposed

# bits of mantissa, bias of the exponent
FORMATS = {E4M3: (3, 7), E5M2: (2, 15)}
FORMAT = pytest.mark.parametrize("dtype", FORMATS)


def defined(dtype) -> torch.Tensor:
    """The 256 numbers by byte; NaN beyond the largest."""
    mantissa_bits, bias = FORMATS[dtype]
    byte = torch.arange(256)
    mantissa = (byte % 2**mantissa_bits).double() / 2**mantissa_bits
    exponent = (byte % 128) // 2**mantissa_bits
    size = torch.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias).double())
    return torch.where(byte < 128, 1.0, -1.0) * torch.where(size > LARGEST[dtype], torch.nan, size)


@FORMAT
def test_every_byte_decodes_to_its_definition(dtype):
    found, expected = decode(torch.arange(256).to(torch.uint8), dtype).double(), defined(dtype)
    finite = expected.isfinite()
    assert torch.equal(found[finite], expected[finite])
    assert not found[~finite].isfinite().any()


@FORMAT
def test_encoding_takes_the_nearest_number(dtype):
    numbers = defined(dtype)
    numbers = numbers[numbers.isfinite()]
    wanted = torch.randn(2000).double() * LARGEST[dtype] / 4
    wanted = torch.cat((wanted, torch.randn(2000).double() * 0.01)).clamp(-LARGEST[dtype], LARGEST[dtype]).float()
    found = decode(encode(wanted, dtype), dtype).double()
    nearest = (wanted.double()[:, None] - numbers).abs().amin(1)
    assert torch.equal((wanted.double() - found).abs(), nearest)


@FORMAT
def test_ties_go_to_the_even_mantissa(dtype):
    step = 2.0 ** -FORMATS[dtype][0]
    ties = torch.tensor([1 + step / 2, 1 + 3 * step / 2])
    assert decode(encode(ties, dtype), dtype).tolist() == [1.0, 1 + 2 * step]


@FORMAT
def test_too_large_becomes_the_largest(dtype):
    found = decode(encode(torch.tensor([1e6, -1e6, float("inf")]), dtype), dtype)
    assert found.tolist() == [LARGEST[dtype], -LARGEST[dtype], LARGEST[dtype]]


@FORMAT
def test_scale_brings_the_largest_value_to_the_largest_number(dtype):
    found = scale_for(torch.tensor([3.0, 0.0, float("inf"), float("nan"), 1e-45]), dtype, False, 0.0)
    assert found.tolist() == [torch.tensor(LARGEST[dtype] / 3).item(), 1.0, 1.0, 1.0, torch.finfo(torch.float32).max]


@FORMAT
def test_scales_of_powers_of_two_are_rounded_down(dtype):
    amax = torch.tensor([3.0, 7.0, 448.0, 0.1])
    found = scale_for(amax, dtype, True, 0.0)
    exact = LARGEST[dtype] / amax.double()
    assert torch.equal(found.log2(), found.log2().round())
    assert ((found <= exact) & (exact < 2 * found)).all()


def test_epsilon_is_the_smallest_magnitude():
    assert scale_for(torch.tensor([1e-9]), E4M3, False, 0.5).item() == 896.0


def test_transposed_copies_lie_row_by_row():
    data = torch.arange(24).to(torch.uint8).view(2, 3, 4)
    found = transposed(data)
    assert found.is_contiguous() and found.shape == (4, 2, 3)
    assert torch.equal(found, data.permute(2, 0, 1))
