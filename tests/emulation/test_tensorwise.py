"""Quantisation with one scale a tensor against torch's own casts, and delayed scaling's histories."""

import pytest
import torch

from tests.emulation.builders import E4M3, E5M2, LARGEST, TORCH, delayed, tensorwise, values
from tests.emulation.kernels import KernelRefuses
from tests.emulation.table import TABLE


@pytest.fixture
def tensor():
    return torch.randn(6, 32, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_tensor_s_own_scale(dtype, tensor, tex):
    quantizer = tensorwise(dtype)
    found = tex.quantize(tensor, quantizer)
    largest = tensor.float().abs().max()
    scale = LARGEST[dtype] / largest
    expected = (tensor.float() * scale).to(TORCH[dtype])
    assert torch.equal(found._data.view(TORCH[dtype]), expected)
    assert torch.equal(found._transpose.view(TORCH[dtype]), expected.t())
    if not TABLE.at_least("2.17"):  # newer versions leave nothing in the quantizer
        assert (quantizer.amax, quantizer.scale) == (largest, scale)
    assert found._scale_inv == 1 / scale
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_error_is_half_a_step(dtype, tensor, tex):
    """3 bits of mantissa leave 2^-4 of a number, 2 bits 2^-3."""
    found = values(tex.quantize(tensor, tensorwise(dtype)))
    kept = tensor.double().abs() > 0.01  # below lie the subnormal ones
    error = ((found - tensor.double()) / tensor.double())[kept].abs().max()
    assert error <= 2.0 ** (-4 if dtype == E4M3 else -3) + 1e-6


def test_a_power_of_two(tensor, tex):
    scale = 1 / tex.quantize(tensor, tensorwise(force_pow_2_scales=True))._scale_inv
    assert scale.log2() == scale.log2().round()
    assert LARGEST[E4M3] / 2 < (tensor.float().abs().max() * scale) <= LARGEST[E4M3]


def test_delayed_scaling_takes_the_scale_it_is_given(tensor, tex):
    """And keeps the largest magnitude that it met since the last update; larger values than it knew saturate."""
    quantizer = delayed(scale=200.0)
    found = tex.quantize(tensor, quantizer)
    expected = (tensor.float() * 200).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(found._data.view(torch.float8_e4m3fn), expected)
    assert quantizer.amax == tensor.float().abs().max()
    assert quantizer.scale == 200.0
    tex.quantize(tensor * 0.5, quantizer)
    assert quantizer.amax == tensor.float().abs().max()


@pytest.mark.parametrize("make", [delayed, tensorwise])
def test_an_empty_tensor_measures_nothing(make, tex):
    quantizer = make()
    keeps = hasattr(quantizer, "amax")
    if keeps:
        quantizer.amax.fill_(3.0)
        quantizer.scale.fill_(5.0)
    found = tex.quantize(torch.empty(0, 32), quantizer)
    assert keeps == (make is delayed or not TABLE.at_least("2.17"))
    assert not keeps or (quantizer.amax, quantizer.scale) == (3.0, 5.0)
    assert found.shape == (0, 32)


def test_only_the_forms_that_are_asked_for(tensor, tex):
    assert tex.quantize(tensor, tensorwise(columnwise=False))._transpose is None
    alone = tensorwise(rowwise=False)
    if TABLE.at_least("2.20"):
        with pytest.raises(KernelRefuses, match="column-wise data alone"):
            tex.quantize(tensor, alone)
    else:
        assert tex.quantize(tensor, alone)._data is None


@pytest.mark.skipif(not TABLE.at_least("2.17"), reason="2.11 allocates in Python")
@pytest.mark.parametrize("make", [delayed, tensorwise])
def test_what_is_not_written_yet_is_no_number(make, tensor, tex):
    quantizer = make()
    empty = quantizer.make_empty((6, 32), dtype=torch.bfloat16, device="cpu")
    assert empty.dtype == torch.bfloat16 and empty.shape == (6, 32) and empty._quantizer is not None
    assert values(empty).isnan().all()
    tex.quantize(tensor, quantizer, empty)
    assert torch.equal(values(empty), values(tex.quantize(tensor, quantizer)))
    with pytest.raises(KernelRefuses, match="object is not emulated"):
        tex.create_empty_quantized_tensor(object(), [2, 2], torch.float32, torch.device("cpu"), False)


def test_writing_into_a_tensor_drops_what_is_not_asked_for(tensor, tex):
    """On the device too: what is left would be of other values."""
    target = tex.quantize(torch.zeros_like(tensor), tensorwise())
    row_wise = tensorwise(columnwise=False)
    data = target._data
    tex.quantize(tensor, row_wise, target)
    assert target._data is data and target._transpose is None and target._transpose_invalid
    assert torch.equal(values(target), values(tex.quantize(tensor, row_wise)))


def test_the_flag_on_the_device_leaves_the_output(tensor, tex):
    target = tex.quantize(tensor, tensorwise())
    before = target._data.clone()
    tex.quantize(tensor * 2, tensorwise(), target, torch.ones(1))
    assert torch.equal(target._data, before)


def test_back_to_a_wide_format(tensor, tex):
    quantised = tex.quantize(tensor, tensorwise())
    found = tex.dequantize(quantised, tex.DType.kFloat32)
    assert found.dtype == torch.float32
    assert torch.equal(found, values(quantised).float())
    quantised._data = None
    with pytest.raises(KernelRefuses, match="no row-wise data"):
        tex.dequantize(quantised, tex.DType.kFloat32)


def test_column_sums_beside_the_quantised_tensor(tensor, tex):
    sums, quantised = tex.bgrad_quantize(tensor, tensorwise())
    torch.testing.assert_close(sums.double(), tensor.double().sum(0), rtol=2**-8, atol=0)
    assert torch.equal(quantised._data, tex.quantize(tensor, tensorwise())._data)


def test_rows_of_each_expert_have_a_scale_of_their_own(tensor, tex):
    parts = tex.split_quantize(tensor, [2, 0, 4], [tensorwise(), tensorwise(), tensorwise()])
    for part, rows in zip(parts, torch.split(tensor, [2, 0, 4]), strict=True):
        assert torch.equal(part._data, tex.quantize(rows, tensorwise())._data)
    assert parts[0]._scale_inv != parts[2]._scale_inv
    with pytest.raises(KernelRefuses, match="not the tensor's rows"):
        tex.split_quantize(tensor, [2, 2], [tensorwise(), tensorwise()])


def test_bytes_transposed(tex):
    data = torch.randint(0, 256, (4, 6), dtype=torch.uint8)
    out = torch.empty(6, 4, dtype=torch.uint8)
    assert torch.equal(tex.fp8_transpose(data, E4M3, out=None), data.t())
    assert tex.fp8_transpose(data, E4M3, out=out) is out and torch.equal(out, data.t())
    with pytest.raises(KernelRefuses, match="bytes are expected"):
        tex.fp8_transpose(data.float(), E4M3, out=None)


def test_largest_magnitude(tensor, tex):
    amax = torch.zeros(1)
    tex.compute_amax(tensor, amax)
    assert amax == tensor.float().abs().max()


@pytest.mark.parametrize(("algorithm", "expected"), [("max", 32.0), ("most_recent", 112.0)])
def test_histories_roll_and_scales_follow(algorithm, expected, tex):
    """Two tensors: one met 2 where 7 is known, the other met zeros alone and is left as it is; half is margin."""
    history = torch.tensor([[2.0, 0.0], [7.0, 5.0], [1.0, 6.0]])
    scale = torch.tensor([1.0, 9.0])
    update = tex.fused_amax_and_scale_update_after_reduction
    update(history.new_tensor([2.0, 0.0]), [history], [scale], algorithm, E4M3, 1.0)
    assert history.tolist() == [[0.0, 0.0], [1.0, 5.0], [2.0, 6.0]]
    assert scale.tolist() == [expected, 9.0]
    if algorithm == "max":
        update(history.new_tensor([1.0, 3.0]), [history], [scale], algorithm, E4M3, 0.0)
        assert scale.tolist() == [224.0, torch.tensor(448 / 6).item()]


@pytest.mark.parametrize("amax", [float("inf"), float("nan")])
def test_an_infinite_step_keeps_the_scale(amax, tex):
    history, scale = torch.zeros(2, 1), torch.tensor([3.0])
    tex.fused_amax_and_scale_update_after_reduction(torch.tensor([amax]), [history], [scale], "max", E4M3, 0.0)
    assert scale == 3.0


def test_refusals(tex):
    with pytest.raises(KernelRefuses, match=r"torch\.int64 is no wide format"):
        tex.quantize(torch.ones(16, 16, dtype=torch.int64), tensorwise())
    with pytest.raises(KernelRefuses, match="amax_compute_algo 'mean'"):
        tex.fused_amax_and_scale_update_after_reduction(torch.ones(1), [], [], "mean", E4M3, 0.0)
    with pytest.raises(KernelRefuses, match="object does not run on Hopper, or is not emulated"):
        tex.quantize(torch.ones(16, 16), object())
