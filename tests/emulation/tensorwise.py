"""Quantisation with one scale a tensor: the recipes delayed (scales from history) and tensorwise (from the tensor)."""

import torch

from tests.emulation.engine import Quantized, Quantizer, engine, new_quantized
from tests.emulation.fp8 import LARGEST, NOT_A_NUMBER, decode, encode, scale_for, transposed
from tests.emulation.kernels import kernel, refuse_unless
from tests.emulation.names import TORCH_DTYPE, DType
from tests.emulation.table import TABLE


def quantize_tensorwise(tensor: torch.Tensor, quantizer: Quantizer, output: Quantized | None) -> Quantized:
    """A tensor in FP8 with one scale; delayed scaling writes the quantizer's `amax`."""
    source = tensor.detach().float()
    _check_forms(source, quantizer)
    if isinstance(quantizer, engine().Float8CurrentScalingQuantizer):
        scale = _scale_by_the_tensor(source, quantizer)
    else:
        scale = quantizer.scale.detach()
        if source.numel() and quantizer.amax.numel():
            largest = torch.maximum(quantizer.amax, source.abs().amax())
            quantizer.amax.copy_(largest.reshape(quantizer.amax.shape))
    inverse = scale.reciprocal().reshape(1).clone()
    data = encode(source * scale.reshape(()), quantizer.dtype).view(tensor.shape)
    if output is not None:
        return _write(output, data, inverse, quantizer)
    return _new(tensor, data, inverse, quantizer)


def _check_forms(source: torch.Tensor, quantizer: Quantizer) -> None:
    """Mirrors csrc/quantizer.cpp `check_per_tensor_fp8_quantize_output`, which 2.11 lacks."""
    alone = quantizer.columnwise_usage and not quantizer.rowwise_usage and source.numel() > 0
    refuse_unless(not alone or not TABLE.at_least("2.20"), "quantize: column-wise data alone, with one scale")


def _scale_by_the_tensor(source: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """[1] factor; newer versions keep `amax` and `scale` out of the quantizer."""
    kept = hasattr(quantizer, "scale")
    amax, scale = (quantizer.amax, quantizer.scale) if kept else (torch.zeros(1), torch.ones(1))
    if source.numel() == 0:  # csrc/quantizer.cpp `quantize_impl` returns before anything is measured or reduced
        return scale
    if not getattr(quantizer, "use_existing_amax", False):
        amax.copy_(source.abs().amax().reshape(1))
    if quantizer.with_amax_reduction:
        group = quantizer._canonicalized_amax_reduction_group()
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
    return scale.copy_(scale_for(amax, quantizer.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon))


def _new(tensor: torch.Tensor, data: torch.Tensor, inverse: torch.Tensor, quantizer: Quantizer) -> Quantized:
    """Hopper multiplies rows by rows only, so the column-wise form is a transposed copy."""
    parts = {
        "data": data if quantizer.rowwise_usage else None,
        "data_transpose": transposed(data) if quantizer.columnwise_usage else None,
        "fp8_scale_inv": inverse,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    return new_quantized(tensor, quantizer, engine().Float8Tensor, engine().Float8TensorStorage, parts)


def empty_tensorwise(like: torch.Tensor, quantizer: Quantizer) -> Quantized:
    """A tensor of the same shape whose bytes and scale are NaN."""
    data = torch.full(like.shape, NOT_A_NUMBER, dtype=torch.uint8)
    return _new(like, data, torch.full((1,), torch.nan), quantizer)


def _write(output: Quantized, data: torch.Tensor, inverse: torch.Tensor, quantizer: Quantizer) -> Quantized:
    """Mirrors csrc/quantizer.cpp `convert_and_update_tensor`: forms that are not asked for are dropped."""
    output._data = _form(output._data, data, quantizer.rowwise_usage)
    output._transpose = _form(output._transpose, transposed(data), quantizer.columnwise_usage)
    output._transpose_invalid = not quantizer.columnwise_usage
    output._scale_inv.copy_(inverse.view(output._scale_inv.shape))
    output._fp8_dtype = quantizer.dtype
    return output


def _form(old: torch.Tensor | None, new: torch.Tensor, wanted: bool) -> torch.Tensor | None:
    if not wanted or old is None:
        return new if wanted else None
    return old.copy_(new.view(old.shape))


def dequantize_tensorwise(tensor: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """Back from row-wise data."""
    refuse_unless(tensor._data is not None, "dequantize: the tensor has no row-wise data")
    return (decode(tensor._data, tensor._fp8_dtype) * tensor._scale_inv.reshape(())).to(dtype)


@kernel("tensor/storage/float8_tensor_storage.py `_create_transpose`")
def fp8_transpose(input: torch.Tensor, dtype: DType, *, out: torch.Tensor | None) -> torch.Tensor:
    """Bytes [..., n] as [n, ...]."""
    refuse_unless(input.dtype == torch.uint8, f"fp8_transpose: bytes are expected, not {input.dtype}")
    result = transposed(input)
    if out is None:
        return result
    out.copy_(result.view(out.shape))
    return out


@kernel("tensor/utils.py `_cast_master_weights_to_fp8_current_scaling`")
def compute_amax(input: torch.Tensor, amax: torch.Tensor) -> None:
    """Largest magnitude of a tensor into `amax`."""
    amax.copy_(input.detach().float().abs().amax().reshape(amax.shape))


@kernel("quantization.py FP8GlobalStateManager `reduce_and_update_fp8_tensors`")
def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: torch.Tensor,
    amax_histories: list[torch.Tensor],
    scales: list[torch.Tensor],
    amax_compute_algo: str,
    fp8_dtype: DType,
    margin: float,
) -> None:
    """Mirrors common/recipe/delayed_scaling.cu `kernel_bulk`: histories roll by one, row 0 is cleared, scales follow.

    A tensor that met nothing but zeros, an idle expert's, keeps its history and its scale.
    """
    refuse_unless(amax_compute_algo in ("max", "most_recent"), f"amax_compute_algo {amax_compute_algo!r}")
    limit, offset = LARGEST[DType(fp8_dtype)] * 2.0**-margin, 0
    for history, scale in zip(amax_histories, scales, strict=True):
        count = history.shape[1]
        last = amax_reduction_buffer[offset : offset + count]
        last = torch.where(last != 0, last, history[0])
        offset += count
        met = last != 0
        rolled = torch.cat((history[1:], last[None]))
        amax = torch.where(met, last if amax_compute_algo == "most_recent" else rolled.amax(0), 0.0)
        rolled[0] = 0
        history.copy_(torch.where(met, rolled, history))
        new = torch.where(torch.isfinite(amax) & (amax > 0), torch.full_like(amax, limit) / amax, scale)
        scale.copy_(torch.where(torch.isinf(new), torch.full_like(new, torch.finfo(torch.float32).max), new))


def dequantized_dtype(dtype: DType) -> torch.dtype:
    """PyTorch's name of a wide format."""
    return TORCH_DTYPE[DType(dtype)]
