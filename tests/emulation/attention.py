"""Attention: cuDNN's fused kernel for half precision, the softmax kernels of the unfused path, rotary embedding."""

import torch

from tests.emulation.engine import Quantizer
from tests.emulation.kernels import contiguous, kernel, refuse_unless
from tests.emulation.names import (
    DType,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Format,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
)

HALF = (DType.kBFloat16, DType.kFloat16)
LARGEST_HEAD, LONGEST_ROW = 256, 16384
CAUSAL = NVTE_Mask_Type.NVTE_CAUSAL_MASK
SEQUENCE_FIRST = (
    NVTE_QKV_Layout.NVTE_SB3HD,
    NVTE_QKV_Layout.NVTE_SBH3D,
    NVTE_QKV_Layout.NVTE_SBHD_SB2HD,
    NVTE_QKV_Layout.NVTE_SBHD_SBH2D,
    NVTE_QKV_Layout.NVTE_SBHD_SBHD_SBHD,
)


@kernel("attention/dot_product_attention/utils.py `get_attention_backend`")
def get_fused_attn_backend(
    is_training: bool,
    q_dtype: DType,
    kv_dtype: DType,
    qkv_layout: NVTE_QKV_Layout,
    bias_type: NVTE_Bias_Type,
    attn_mask_type: NVTE_Mask_Type,
    softmax_type: NVTE_Softmax_Type,
    p_dropout: float,
    num_attn_heads: int,
    num_gqa_groups: int,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    head_dim_v: int,
    window_size_left: int,
    window_size_right: int,
    return_max_logit: bool,
    cuda_graph: bool,
) -> NVTE_Fused_Attn_Backend:
    """cuDNN's kernel where it has one: half precision, heads of a multiple of 8 up to 256, causal, no bias."""
    fits = (
        q_dtype == kv_dtype
        and q_dtype in HALF
        and qkv_layout in SEQUENCE_FIRST
        and bias_type == NVTE_Bias_Type.NVTE_NO_BIAS
        and attn_mask_type == CAUSAL
        and softmax_type == NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX
        and head_dim_qk == head_dim_v
        and head_dim_qk % 8 == 0
        and head_dim_qk <= LARGEST_HEAD
        and num_attn_heads % num_gqa_groups == 0
        and max_seqlen_q == max_seqlen_kv
        and not return_max_logit
    )
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen if fits else NVTE_Fused_Attn_Backend.NVTE_No_Backend


@kernel("cpp_extensions/fused_attn.py `fused_attn_fwd`")
def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: NVTE_QKV_Layout,
    bias_type: NVTE_Bias_Type,
    attn_mask_type: NVTE_Mask_Type,
    softmax_type: NVTE_Softmax_Type,
    window_size: tuple[int, int],
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: torch.Tensor | None,
    cu_seqlens_kv_padded: torch.Tensor | None,
    page_table_k: torch.Tensor | None,
    page_table_v: torch.Tensor | None,
    s_quantizer: Quantizer | None,
    o_quantizer: Quantizer | None,
    Bias: torch.Tensor | None,
    SoftmaxOffset: torch.Tensor | None,
    rng_gen: torch.Generator | None,
    rng_elts_per_thread: int,
    return_max_logit: bool,
    cuda_graph: bool,
) -> list[torch.Tensor]:
    """Output [sequence, batch, heads, dim], log-sum-exp [batch, heads, sequence, 1] in fp32, state of the generator."""
    absent = (page_table_k, page_table_v, s_quantizer, o_quantizer, Bias, SoftmaxOffset)
    refuse_unless(all(value is None for value in absent), "fused_attn_fwd: paging, FP8, bias are not emulated")
    _check(qkv_layout, attn_mask_type, p_dropout, window_size, Q, K, V)
    scores = _scores(Q, K, attn_scale, window_size)
    statistics = scores.logsumexp(-1, keepdim=True)
    values = _by_head(V, Q.shape[2])
    output = torch.einsum("bhst,bhtd->sbhd", (scores - statistics).exp(), values).to(Q.dtype).contiguous()
    return [output, statistics, torch.zeros(2, dtype=torch.int64)]


@kernel("cpp_extensions/fused_attn.py `fused_attn_bwd`")
def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: NVTE_QKV_Layout,
    bias_type: NVTE_Bias_Type,
    attn_mask_type: NVTE_Mask_Type,
    softmax_type: NVTE_Softmax_Type,
    window_size: tuple[int, int],
    deterministic: bool,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    O: torch.Tensor,  # noqa: E741
    dO: torch.Tensor,
    fake_dtype: torch.dtype,
    dqkv_type: DType | None,
    Aux_CTX_Tensors: list[torch.Tensor],
    cu_seqlens_q_padded: torch.Tensor | None,
    cu_seqlens_kv_padded: torch.Tensor | None,
    s_quantizer: Quantizer | None,
    dp_quantizer: Quantizer | None,
    dqkv_quantizer: Quantizer | None,
    cuda_graph: bool,
) -> list[torch.Tensor | None]:
    """Gradients of queries, keys, values; no bias, no softmax offset."""
    refuse_unless(dqkv_quantizer is None and dp_quantizer is None, "fused_attn_bwd: FP8 attention is not emulated")
    _check(qkv_layout, attn_mask_type, p_dropout, window_size, Q, K, V)
    heads, groups = Q.shape[2], K.shape[2]
    probabilities = (_scores(Q, K, attn_scale, window_size) - Aux_CTX_Tensors[0]).exp()
    gradient = dO.float().permute(1, 2, 0, 3)
    output = O.float().permute(1, 2, 0, 3)
    of_values = probabilities.transpose(-1, -2) @ gradient
    of_probabilities = gradient @ _by_head(V, heads).transpose(-1, -2)
    of_scores = probabilities * (of_probabilities - (gradient * output).sum(-1, keepdim=True)) * attn_scale
    of_queries = of_scores @ _by_head(K, heads)
    of_keys = of_scores.transpose(-1, -2) @ Q.float().permute(1, 2, 0, 3)
    results = (_sequence_first(of_queries, heads), *(_sequence_first(part, groups) for part in (of_keys, of_values)))
    return [*(result.to(Q.dtype) for result in results), None, None]


def _check(layout, mask, dropout: float, window: tuple[int, int], *tensors: torch.Tensor) -> None:
    refuse_unless(layout in SEQUENCE_FIRST, f"fused attention: layout {layout!r} is not emulated")
    refuse_unless(mask == CAUSAL and window[1] in (0, -1), f"fused attention: mask {mask!r}, window {window}")
    refuse_unless(dropout == 0.0, "fused attention: dropout is not emulated")
    for tensor in tensors:
        refuse_unless(tensor.dtype in (torch.bfloat16, torch.float16), f"fused attention in {tensor.dtype}")
        refuse_unless(tensor.stride(-1) == 1, "fused attention: the head's numbers do not lie side by side")
    separate = layout == NVTE_QKV_Layout.NVTE_SBHD_SBHD_SBHD
    if separate:
        contiguous("fused attention, layout sbhd_sbhd_sbhd", *tensors)


def _by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[sequence, batch, groups, dim] as fp32 [batch, heads, sequence, dim]: a group serves several heads."""
    return tensor.float().permute(1, 2, 0, 3).repeat_interleave(heads // tensor.shape[2], 1)


def _sequence_first(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[batch, heads, sequence, dim] as [sequence, batch, groups, dim], summed over the heads of a group."""
    batch, heads, sequence, dim = tensor.shape
    summed = tensor.view(batch, groups, heads // groups, sequence, dim).sum(2)
    return summed.permute(2, 0, 1, 3).contiguous()


def _scores(queries: torch.Tensor, keys: torch.Tensor, scale: float, window: tuple[int, int]) -> torch.Tensor:
    heads, length = queries.shape[2], queries.shape[0]
    scores = queries.float().permute(1, 2, 0, 3) @ _by_head(keys, heads).transpose(-1, -2) * scale
    keep = torch.ones(length, length, dtype=torch.bool).tril()
    if window[0] >= 0:
        keep &= torch.ones(length, length, dtype=torch.bool).triu(-window[0])
    return scores.masked_fill(~keep, float("-inf"))


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


def _softmax_backward(gradient: torch.Tensor, result: torch.Tensor, scale: float) -> torch.Tensor:
    g, p = gradient.float(), result.float()
    return (scale * p * (g - (g * p).sum(-1, keepdim=True))).to(gradient.dtype)


def _register_softmax_backward(name: str, autograd_class: str) -> None:
    def backward(output_grad: torch.Tensor, softmax_results: torch.Tensor, scale_factor: float) -> torch.Tensor:
        _check_softmax(name, output_grad, softmax_results)
        return _softmax_backward(output_grad, softmax_results, scale_factor)

    backward.__name__, backward.__doc__ = name, "Gradient of the scores."
    kernel(f"attention/dot_product_attention/softmax.py {autograd_class}")(backward)


for _name, _class in (
    ("scaled_upper_triang_masked_softmax", "ScaledUpperTriangMaskedSoftmax"),
    ("scaled_aligned_causal_masked_softmax", "ScaledAlignedCausalMaskedSoftmax"),
    ("scaled_masked_softmax", "ScaledMaskedSoftmax"),
    ("scaled_softmax", "ScaledSoftmax"),
):
    _register_softmax_backward(f"{_name}_backward", _class)


def _rotate(
    tensor: torch.Tensor, freqs: torch.Tensor, layout: NVTE_QKV_Format, interleaved: bool, sign: int
) -> torch.Tensor:
    refuse_unless(not interleaved, "fused_rope: interleaved halves are not emulated")
    refuse_unless(freqs.dtype == torch.float32, f"fused_rope: frequencies in {freqs.dtype}")
    refuse_unless(freqs.dim() == 4 and freqs.shape[1:3] == (1, 1), f"fused_rope: frequencies {tuple(freqs.shape)}")
    refuse_unless(tensor.dim() == 4, f"fused_rope: {tensor.dim()} dimensions")
    refuse_unless(tensor.shape[-1] >= freqs.shape[-1], "fused_rope: more frequencies than a head has numbers")
    sequence = tensor.shape[0 if layout == NVTE_QKV_Format.NVTE_SBHD else 1]
    refuse_unless(freqs.shape[0] >= sequence, f"fused_rope: {freqs.shape[0]} positions for {sequence} tokens")
    angles = freqs[:sequence]  # [sequence, 1, 1, dim]
    if layout == NVTE_QKV_Format.NVTE_BSHD:
        angles = angles.transpose(0, 1)
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
    absent = cu_seqlens is None and start_positions is None and cp_size == 1
    refuse_unless(absent, "fused_rope: packed sequences and context parallelism are not emulated")
    return _rotate(input.detach(), freqs, qkv_format, interleaved, 1)


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
    return _rotate(output_grads, freqs, qkv_format, interleaved, -1)
