"""Block scaling against a loop over blocks in float64."""

import pytest
import torch

from tests.emulation.builders import E4M3, TORCH, blockwise, by_element, values
from tests.emulation.engine import engine
from tests.emulation.kernels import KernelRefuses
from tests.emulation.table import TABLE

ROWS, COLUMNS = 144, 272  # neither a multiple of 128


@pytest.fixture
def tensor():
    """Rows of very different sizes."""
    return (torch.randn(ROWS, COLUMNS) * torch.logspace(-3, 3, ROWS)[:, None]).bfloat16()


def by_blocks(matrix: torch.Tensor, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 numbers and inverse scales of blocks [height, 128], powers of two."""
    data = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    inverse = torch.empty(-(-matrix.shape[0] // height), -(-matrix.shape[1] // 128))
    for row in range(inverse.shape[0]):
        for column in range(inverse.shape[1]):
            place = slice(row * height, (row + 1) * height), slice(column * 128, (column + 1) * 128)
            block = matrix[place].float()
            scale = 2.0 ** (448 / block.abs().max().double()).log2().floor().float()
            data[place], inverse[row, column] = (block * scale).to(torch.float8_e4m3fn), 1 / scale
    return data, inverse


@pytest.mark.parametrize("dims", [1, 2])
def test_every_block_has_a_scale_of_its_own(dims, tensor, tex):
    found = tex.quantize(tensor, blockwise(dims))
    height = 128 if dims == 2 else 1
    data, inverse = by_blocks(tensor, height)
    assert torch.equal(found._rowwise_data.view(TORCH[E4M3]).float(), data.float())
    scales = (
        found._rowwise_scale_inv[: inverse.shape[0], : inverse.shape[1]]
        if dims == 2
        else (found._rowwise_scale_inv.t()[:ROWS])
    )
    assert torch.equal(scales, inverse)
    turned, inverse = by_blocks(tensor.t().contiguous(), height)
    assert torch.equal(found._columnwise_data.view(TORCH[E4M3]).float(), turned.float())
    scales = (
        found._columnwise_scale_inv[: inverse.shape[0], : inverse.shape[1]]
        if dims == 2
        else (found._columnwise_scale_inv.t()[:COLUMNS])
    )
    assert torch.equal(scales, inverse)


@pytest.mark.parametrize("dims", [1, 2])
def test_transformer_engine_s_own_python_reads_them(dims, tensor, tex):
    quantised = tex.quantize(tensor, blockwise(dims))
    torch.testing.assert_close(quantised.dequantize(dtype=torch.float32).double(), values(quantised), rtol=0, atol=0)


def test_rows_of_small_numbers_keep_their_precision(tensor, tex):
    """What block scaling is for: one scale for the tensor loses them."""
    error = ((values(tex.quantize(tensor, blockwise())) - tensor.double()) / tensor.double()).abs()
    assert error[:10].median() < 2.0**-4


@pytest.mark.skipif(not TABLE.at_least("2.17"), reason="2.11 allocates in Python")
@pytest.mark.parametrize("dims", [1, 2])
def test_what_is_not_written_yet_is_no_number(dims, tensor, tex):
    empty = blockwise(dims).make_empty((ROWS, COLUMNS), dtype=torch.bfloat16, device="cpu")
    assert values(empty).isnan().all()
    tex.quantize(tensor, blockwise(dims), empty)
    assert torch.equal(values(empty), values(tex.quantize(tensor, blockwise(dims))))


@pytest.mark.skipif(TABLE.at_least("2.17"), reason="newer versions gather what products read")
def test_scales_that_travel_are_compact(tensor, tex):
    found = tex.quantize(tensor, blockwise(all_gather_usage=True))
    assert found._rowwise_scale_inv.shape == (ROWS, 3)
    assert found._columnwise_scale_inv.shape == (2, COLUMNS)
    assert found._columnwise_data.shape == (ROWS, COLUMNS)
    data, inverse = by_blocks(tensor, 1)
    assert torch.equal(found._rowwise_data.view(TORCH[E4M3]).float(), data.float())
    assert torch.equal(found._rowwise_scale_inv, inverse)
    turned, inverse = by_blocks(tensor.t().contiguous(), 1)
    assert torch.equal(found._columnwise_data.view(TORCH[E4M3]).float(), turned.t().float())
    assert torch.equal(found._columnwise_scale_inv, inverse.t())


def test_writing_into_a_tensor_drops_what_is_not_asked_for(tensor, tex):
    target = tex.quantize(torch.zeros_like(tensor), blockwise(2))
    tex.quantize(tensor, blockwise(2, columnwise=False), target)
    assert target._columnwise_data is None and target._columnwise_scale_inv is None
    assert torch.equal(values(target), values(tex.quantize(tensor, blockwise(2))))


def test_shares_of_a_weight_give_the_whole(tex):
    """Two ranks cast their shares of a weight, after the largest magnitudes of the blocks met."""
    weight = torch.randn(256, 144)
    whole = tex.quantize(weight, blockwise(2))
    shares, block, amaxes = weight.flatten().split([10_000, 26_864]), (2, 2), []
    for start, share in zip((0, 10_000), shares, strict=True):
        amaxes.append(torch.full(block, 9.0))
        tex.fp8_block_scaling_compute_partial_amax(share, amaxes[-1], 256, 144, start, 128)
    scale = 2.0 ** (448 / torch.maximum(*amaxes)).log2().floor()
    out = torch.zeros(256 * 144, dtype=torch.uint8)
    for start, share in zip((0, 10_000), shares, strict=True):
        target = out[start : start + share.numel()]
        tex.fp8_block_scaling_partial_cast(share, target, scale, 256, 144, start, 128, E4M3)
    assert torch.equal(out.view(256, 144), whole._rowwise_data)
    assert torch.equal(1 / scale, whole._rowwise_scale_inv[:, :2])
    assert torch.equal(by_element(1 / scale, (256, 144), True), by_element(whole._rowwise_scale_inv, (256, 144), True))


def test_an_expert_without_rows(tex):
    assert tex.quantize(torch.empty(0, 256), blockwise())._rowwise_data.shape == (0, 256)


def test_first_dimensions_swapped(tex):
    data = torch.randint(0, 256, (2, 3, 5), dtype=torch.uint8)
    expected = torch.stack([torch.stack([data[i, j] for i in range(2)]) for j in range(3)])
    out = torch.empty(3, 2, 5, dtype=torch.uint8)
    assert torch.equal(tex.swap_first_dims(data, out=None), expected)
    assert tex.swap_first_dims(data, out=out) is out and torch.equal(out, expected)
    for wrong in (data[0, 0], data.transpose(0, 1)):
        with pytest.raises(KernelRefuses, match="swap_first_dims: "):
            tex.swap_first_dims(wrong, out=None)


def test_refusals(tex, tensor):
    with pytest.raises(KernelRefuses, match="inner dimension 40 is not a multiple of 16"):
        tex.quantize(torch.ones(128, 40), blockwise())
    with pytest.raises(KernelRefuses, match="blocks of 64"):
        tex.fp8_block_scaling_compute_partial_amax(torch.ones(16), torch.ones(1, 1), 4, 4, 0, 64)
    with pytest.raises(KernelRefuses, match="bytes are expected"):
        share, scale = torch.ones(16), torch.ones(1, 1)
        tex.fp8_block_scaling_partial_cast(share, torch.ones(16), scale, 4, 4, 0, 128, E4M3)
    assert isinstance(tex.quantize(tensor, blockwise()), engine().Float8BlockwiseQTensor)
