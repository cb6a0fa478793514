"""Quantisation with a scale for every 128 values of a row (activations, gradients) or every 128 x 128 (weights)."""

import torch

from tests.emulation.engine import Quantized, Quantizer, arguments, engine, new_quantized
from tests.emulation.fp8 import NOT_A_NUMBER, encode, scale_for
from tests.emulation.kernels import contiguous, kernel, refuse_unless
from tests.emulation.names import DType, Float8BlockScaleTensorFormat

BLOCK = 128
FIELDS = ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")


def quantize_blockwise(tensor: torch.Tensor, quantizer: Quantizer, output: Quantized | None) -> Quantized:
    """A tensor in FP8 with block scales, in the forms that the quantizer's usages ask for."""
    matrix = tensor.detach().float().reshape(-1, tensor.shape[-1])
    refuse_unless(
        matrix.numel() == 0 or matrix.shape[1] % 16 == 0,
        f"block scaling: inner dimension {matrix.shape[1]} is not a multiple of 16",
    )
    parts = dict.fromkeys(FIELDS)
    if quantizer.rowwise_usage:
        parts["rowwise_data"], parts["rowwise_scale_inv"] = _rowwise(matrix, tensor.shape, quantizer)
    if quantizer.columnwise_usage:
        parts["columnwise_data"], parts["columnwise_scale_inv"] = _columnwise(matrix, tensor.shape, quantizer)
    if output is not None:
        return _write(output, parts, quantizer)
    return _new(tensor, parts, quantizer)


def empty_blockwise(like: torch.Tensor, quantizer: Quantizer) -> Quantized:
    """A tensor of the same shape whose bytes and scales are NaN."""
    parts, shape = dict.fromkeys(FIELDS), tuple(like.shape)
    for form, wanted in (("rowwise", quantizer.rowwise_usage), ("columnwise", quantizer.columnwise_usage)):
        if wanted:
            stored = shape if form == "rowwise" else quantizer.get_columnwise_shape(shape)
            parts[f"{form}_data"] = torch.full(tuple(stored), NOT_A_NUMBER, dtype=torch.uint8)
            scales = quantizer.get_scale_shape(shape, form == "columnwise")
            parts[f"{form}_scale_inv"] = torch.full(tuple(scales), torch.nan)
    return _new(like, parts, quantizer)


def _new(tensor: torch.Tensor, parts: dict, quantizer: Quantizer) -> Quantized:
    parts |= {"fp8_dtype": quantizer.dtype, "quantizer": quantizer, "is_2D_scaled": quantizer.block_scaling_dim == 2}
    storage = engine().Float8BlockwiseQTensorStorage
    if "data_format" in arguments(storage.__new__):
        name = "COMPACT" if _is_compact(quantizer) else "GEMM_READY"
        parts["data_format"] = Float8BlockScaleTensorFormat[name]
    return new_quantized(tensor, quantizer, engine().Float8BlockwiseQTensor, storage, parts)


def _is_compact(quantizer: Quantizer) -> bool:
    """Whether the tensor is still to be gathered; newer versions gather what products read."""
    return getattr(quantizer, "all_gather_usage", False)


def _rowwise(matrix: torch.Tensor, shape: torch.Size, quantizer: Quantizer) -> tuple:
    two = quantizer.block_scaling_dim == 2
    data, inverse = _blocks(matrix, BLOCK if two else 1, quantizer)
    # One-dimensional scales lie transposed for cuBLAS, unless the tensor is still to be gathered.
    inverse = inverse if two or _is_compact(quantizer) else inverse.t()
    return data.view(shape), _padded(inverse, quantizer.get_scale_shape(shape, False))


def _columnwise(matrix: torch.Tensor, shape: torch.Size, quantizer: Quantizer) -> tuple:
    two = quantizer.block_scaling_dim == 2
    data, inverse = _blocks(matrix.t().contiguous(), BLOCK if two else 1, quantizer)
    data = data.t().contiguous() if _is_compact(quantizer) and not two else data
    inverse = inverse if two else inverse.t()
    return data.view(quantizer.get_columnwise_shape(shape)), _padded(inverse, quantizer.get_scale_shape(shape, True))


def _blocks(matrix: torch.Tensor, rows: int, quantizer: Quantizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [M, K] and the scales' inverses [ceil(M / rows), ceil(K / 128)]."""
    height, width = matrix.shape
    whole = torch.nn.functional.pad(matrix, (0, -width % BLOCK, 0, -height % rows))
    tiles = whole.view(whole.shape[0] // rows, rows, whole.shape[1] // BLOCK, BLOCK)
    scale = scale_for(
        tiles.abs().amax(dim=(1, 3)), quantizer.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon
    )
    scaled = (tiles * scale[:, None, :, None]).reshape(whole.shape)[:height, :width]
    return encode(scaled.contiguous(), quantizer.dtype), 1.0 / scale


def _padded(inverse: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    result = torch.zeros(tuple(shape), dtype=torch.float32)
    result[: inverse.shape[0], : inverse.shape[1]] = inverse
    return result


def _write(output: Quantized, parts: dict, quantizer: Quantizer) -> Quantized:
    """Mirrors csrc/quantizer.cpp `convert_and_update_tensor`: forms that are not asked for are dropped."""
    for name in FIELDS:
        old, new = getattr(output, f"_{name}"), parts[name]
        setattr(output, f"_{name}", new if old is None or new is None else old.copy_(new.view(old.shape)))
    return output


@kernel("tensor/utils.py `_cast_master_weights_to_fp8_blockwise_scaling`")
def fp8_block_scaling_compute_partial_amax(
    tensor: torch.Tensor, amax: torch.Tensor, h: int, w: int, start_offset: int, block_len: int
) -> None:
    """Largest magnitude of each block of a [h, w] weight in a rank's share of it; zeros elsewhere."""
    _check_partial("fp8_block_scaling_compute_partial_amax", tensor, amax, block_len)
    whole = torch.zeros(h * w)
    whole[start_offset : start_offset + tensor.numel()] = tensor.detach().float().abs().reshape(-1)
    whole = torch.nn.functional.pad(whole.view(h, w), (0, -w % block_len, 0, -h % block_len))
    tiles = whole.view(whole.shape[0] // block_len, block_len, -1, block_len).amax(dim=(1, 3))
    amax[: tiles.shape[0], : tiles.shape[1]].copy_(tiles)


@kernel("tensor/utils.py `_cast_master_weights_to_fp8_blockwise_scaling`")
def fp8_block_scaling_partial_cast(
    inp: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    h: int,
    w: int,
    start_offset: int,
    block_len: int,
    out_dtype: DType,
) -> None:
    """A rank's share of a [h, w] weight in FP8, by the scales of its blocks."""
    _check_partial("fp8_block_scaling_partial_cast", inp, scale, block_len)
    refuse_unless(out.dtype == torch.uint8, f"fp8_block_scaling_partial_cast: bytes are expected, not {out.dtype}")
    scales = scale.repeat_interleave(block_len, 0).repeat_interleave(block_len, 1)[:h, :w].reshape(-1)
    own = scales[start_offset : start_offset + inp.numel()]
    out.copy_(encode(inp.detach().float().reshape(-1) * own, out_dtype).view(out.shape))


def _check_partial(name: str, tensor: torch.Tensor, by_block: torch.Tensor, block_len: int) -> None:
    """Mirrors csrc/extensions/fp8_partial_cast.cpp."""
    refuse_unless(block_len == BLOCK, f"{name}: blocks of {block_len}")
    refuse_unless(tensor.dtype in (torch.float32, torch.bfloat16), f"{name}: {tensor.dtype}")
    refuse_unless(by_block.dtype == torch.float32 and by_block.dim() == 2, f"{name}: one fp32 number a block")
    contiguous(name, tensor)


@kernel("distributed.py, which gathers blockwise activations over TP ranks")
def swap_first_dims(tensor: torch.Tensor, *, out: torch.Tensor | None) -> torch.Tensor:
    """[a, b, ...] as [b, a, ...]; transpose.cpp of the extension."""
    contiguous("swap_first_dims", tensor)
    refuse_unless(tensor.dim() > 1, f"swap_first_dims: a tensor of {tensor.dim()} dimensions")
    result = tensor.transpose(0, 1).contiguous()
    if out is None:
        return result
    refuse_unless(out.numel() == result.numel() and out.dtype == result.dtype, "swap_first_dims: another size or dtype")
    contiguous("swap_first_dims", out)
    out.copy_(result.view(out.shape))
    return out
