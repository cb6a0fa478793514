"""Attention without cuDNN's fused kernel: the softmax kernels of the unfused path, and rotary embedding."""

import torch

from tests.emulation.kernels import contiguous, kernel, refuse_unless
from tests.emulation.names import NVTE_QKV_Format
from tests.emulation.packed import sequences

LONGEST_ROW = 16384


def _check_softmax(name: str, *tensors: torch.Tensor) -> None:
    """Mirrors csrc/extensions/softmax.cpp."""
    contiguous(name, *tensors)
    for tensor in tensors:
        refuse_unless(tensor.dtype in (torch.bfloat16, torch.float16), f"{name} in {tensor.dtype}")
        refuse_unless(tensor.shape[-1] <= LONGEST_ROW, f"{name}: rows of {tensor.shape[-1]} scores")
        causal = "upper_triang" in name
        refuse_unless(tensor.dim() == (3 if causal else 4), f"{name}: {tensor.dim()} dimensions")
        refuse_unless(causal or tensor.shape[-1] % 8 == 0, f"{name}: {tensor.shape[-1]} keys, not a multiple of 8")


def _softmax(scores: torch.Tensor, keep: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    values = scores if keep is None else scores.masked_fill(~keep, float("-inf"))
    return torch.nan_to_num(torch.softmax(values, -1)).to(dtype)


def _lower_triangle(rows: int, columns: int) -> torch.Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)


@kernel("attention/dot_product_attention/softmax.py ScaledUpperTriangMaskedSoftmax")
def scaled_upper_triang_masked_softmax_forward(input: torch.Tensor, scale_factor: float) -> torch.Tensor:
    """Causal softmax of [batches, sequence, sequence]."""
    _check_softmax("scaled_upper_triang_masked_softmax_forward", input)
    return _softmax(input.float() * scale_factor, _lower_triangle(*input.shape[-2:]), input.dtype)


@kernel("attention/dot_product_attention/softmax.py ScaledAlignedCausalMaskedSoftmax")
def scaled_aligned_causal_masked_softmax_forward(input: torch.Tensor, scale_factor: float) -> torch.Tensor:
    """Causal softmax of [batch, heads, queries, keys], aligned at the end."""
    _check_softmax("scaled_aligned_causal_masked_softmax_forward", input)
    return _softmax(input.float() * scale_factor, _lower_triangle(*input.shape[-2:]), input.dtype)


@kernel("attention/dot_product_attention/softmax.py ScaledMaskedSoftmax")
def scaled_masked_softmax_forward(input: torch.Tensor, mask: torch.Tensor, scale_factor: float) -> torch.Tensor:
    """Softmax where the mask is not set."""
    _check_softmax("scaled_masked_softmax_forward", input)
    pads = mask.dim() == 4 and mask.shape[0] in (1, input.shape[0]) and tuple(mask.shape[1:]) == (1, *input.shape[2:])
    refuse_unless(pads, f"scaled_masked_softmax_forward: a mask {tuple(mask.shape)}")
    return _softmax(input.float() * scale_factor, ~mask.bool(), input.dtype)


@kernel("attention/dot_product_attention/softmax.py ScaledSoftmax")
def scaled_softmax_forward(input: torch.Tensor, scale_factor: float) -> torch.Tensor:
    """Softmax of everything."""
    _check_softmax("scaled_softmax_forward", input)
    return _softmax(input.float() * scale_factor, None, input.dtype)


def _softmax_backward(name: str, gradient: torch.Tensor, result: torch.Tensor, scale: float) -> torch.Tensor:
    _check_softmax(name, gradient, result)
    g, p = gradient.float(), result.float()
    return (scale * p * (g - (g * p).sum(-1, keepdim=True))).to(gradient.dtype)


@kernel("attention/dot_product_attention/softmax.py ScaledUpperTriangMaskedSoftmax")
def scaled_upper_triang_masked_softmax_backward(
    output_grads: torch.Tensor, softmax_results: torch.Tensor, scale_factor: float
) -> torch.Tensor:
    """Gradient of the scores."""
    name = "scaled_upper_triang_masked_softmax_backward"
    return _softmax_backward(name, output_grads, softmax_results, scale_factor)


@kernel("attention/dot_product_attention/softmax.py ScaledAlignedCausalMaskedSoftmax")
def scaled_aligned_causal_masked_softmax_backward(
    output_grads: torch.Tensor, softmax_results: torch.Tensor, scale_factor: float
) -> torch.Tensor:
    """Gradient of the scores."""
    name = "scaled_aligned_causal_masked_softmax_backward"
    return _softmax_backward(name, output_grads, softmax_results, scale_factor)


@kernel("attention/dot_product_attention/softmax.py ScaledMaskedSoftmax")
def scaled_masked_softmax_backward(
    output_grad: torch.Tensor, softmax_results: torch.Tensor, scale_factor: float
) -> torch.Tensor:
    """Gradient of the scores."""
    return _softmax_backward("scaled_masked_softmax_backward", output_grad, softmax_results, scale_factor)


@kernel("attention/dot_product_attention/softmax.py ScaledSoftmax")
def scaled_softmax_backward(
    output_grad: torch.Tensor, softmax_results: torch.Tensor, scale_factor: float
) -> torch.Tensor:
    """Gradient of the scores."""
    return _softmax_backward("scaled_softmax_backward", output_grad, softmax_results, scale_factor)


def _rotate(
    tensor: torch.Tensor,
    freqs: torch.Tensor,
    layout: NVTE_QKV_Format,
    interleaved: bool,
    cu_seqlens: torch.Tensor | None,
    sign: int,
) -> torch.Tensor:
    refuse_unless(not interleaved, "fused_rope: interleaved halves are not emulated")
    refuse_unless(freqs.dtype == torch.float32, f"fused_rope: frequencies in {freqs.dtype}")
    refuse_unless(freqs.dim() == 4 and freqs.shape[1:3] == (1, 1), f"fused_rope: frequencies {tuple(freqs.shape)}")
    packed = layout == NVTE_QKV_Format.NVTE_THD
    refuse_unless(tensor.dim() == (3 if packed else 4), f"fused_rope: {tensor.dim()} dimensions")
    refuse_unless(tensor.shape[-1] >= freqs.shape[-1], "fused_rope: more frequencies than a head has numbers")
    if packed:
        # Each sequence from the first position on. Tokens past the last one keep what is in the memory.
        places = sequences("fused_rope", cu_seqlens, len(tensor), len(freqs))
        refuse_unless(places and places[-1].stop == len(tensor), "fused_rope: tokens after the last sequence")
        angles = torch.cat([freqs[: place.stop - place.start] for place in places])
        return _turned(tensor[:, None], angles, sign)[:, 0]
    refuse_unless(cu_seqlens is None, "fused_rope: cu_seqlens beside another format than thd")
    sequence = tensor.shape[0 if layout == NVTE_QKV_Format.NVTE_SBHD else 1]
    refuse_unless(freqs.shape[0] >= sequence, f"fused_rope: {freqs.shape[0]} positions for {sequence} tokens")
    angles = freqs[:sequence]  # [sequence, 1, 1, dim]
    if layout == NVTE_QKV_Format.NVTE_BSHD:
        angles = angles.transpose(0, 1)
    return _turned(tensor, angles, sign)


def _turned(tensor: torch.Tensor, angles: torch.Tensor, sign: int) -> torch.Tensor:
    width = angles.shape[-1]
    turned, rest = tensor[..., :width].float(), tensor[..., width:]
    first, second = turned.chunk(2, -1)
    # Backward is the transposed rotation; the frequencies of both halves are equal.
    other = torch.cat((-sign * second, sign * first), -1)
    return torch.cat(((turned * angles.cos() + other * angles.sin()).to(tensor.dtype), rest), -1)


@kernel("attention/rope.py FusedRoPEFunc")
def fused_rope_forward(
    input: torch.Tensor,
    freqs: torch.Tensor,
    start_positions: torch.Tensor | None,
    qkv_format: NVTE_QKV_Format,
    interleaved: bool,
    cu_seqlens: torch.Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> torch.Tensor:
    """Rotary embedding of [sequence, batch, heads, dim]; any strides."""
    absent = start_positions is None and cp_size == 1
    refuse_unless(absent, "fused_rope: starting positions and context parallelism are not emulated")
    return _rotate(input.detach(), freqs, qkv_format, interleaved, cu_seqlens, 1)


@kernel("attention/rope.py FusedRoPEFunc")
def fused_rope_backward(
    output_grads: torch.Tensor,
    freqs: torch.Tensor,
    start_positions: torch.Tensor | None,
    qkv_format: NVTE_QKV_Format,
    interleaved: bool,
    cu_seqlens: torch.Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> torch.Tensor:
    """The rotation back."""
    return _rotate(output_grads, freqs, qkv_format, interleaved, cu_seqlens, -1)
