"""Attention in one kernel: cuDNN's for half precision, as Transformer Engine 2.11, 2.17 and 2.20 call it."""

from typing import Any

import torch

from tests.emulation.engine import Quantizer
from tests.emulation.kernels import contiguous, kernel, refuse_unless
from tests.emulation.names import (
    DType,
    NVTE_Bias_Type,
    NVTE_Mask_Type,
    NVTE_QKV_Format,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
)
from tests.emulation.packed import sequences

CAUSAL = NVTE_Mask_Type["NVTE_CAUSAL_MASK"]
CAUSAL_AT_THE_END = NVTE_Mask_Type["NVTE_CAUSAL_BOTTOM_RIGHT_MASK"]
NO_MASK = NVTE_Mask_Type["NVTE_NO_MASK"]
CAUSAL_PACKED = NVTE_Mask_Type["NVTE_PADDING_CAUSAL_MASK"]
NO_FORMAT = "NVTE_QKV_Format_NOT_SET"
SEQUENCE_FIRST = tuple(
    NVTE_QKV_Layout[f"NVTE_{name}"] for name in ("SB3HD", "SBH3D", "SBHD_SB2HD", "SBHD_SBH2D", "SBHD_SBHD_SBHD")
)
PACKED = tuple(NVTE_QKV_Layout[f"NVTE_{name}"] for name in ("T3HD", "TH3D", "THD_T2HD", "THD_TH2D", "THD_THD_THD"))
MASK_OF_LAYOUT = dict.fromkeys(SEQUENCE_FIRST, CAUSAL) | dict.fromkeys(PACKED, CAUSAL_PACKED)
MASKS_OF_PARTS = (NO_MASK, CAUSAL_AT_THE_END)
"""Of sequences of one length, as context parallelism computes parts of them: all keys, or causal where the queries are
the last positions."""


def format_of(layout: NVTE_QKV_Layout) -> NVTE_QKV_Format:
    """The format of a tensor of its own in a layout that is emulated."""
    return NVTE_QKV_Format["NVTE_THD" if layout in PACKED else "NVTE_SBHD"]


@kernel("cpp_extensions/fused_attn.py `fused_attn_fwd`", name="fused_attn_fwd")
def fused_attn_fwd_2_11(
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
    """Output [sequence, batch, heads, dim], log-sum-exp [batch, heads, sequence, 1] in fp32, state of the generator; of
    packed sequences [tokens, heads, dim] and [tokens, heads, 1]."""
    return _forward(locals())


@kernel("cpp_extensions/fused_attn.py `fused_attn_fwd`", name="fused_attn_fwd")
def fused_attn_fwd_2_17(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: NVTE_QKV_Layout,
    o_format: NVTE_QKV_Format,
    qkv_scale_inv_format: NVTE_QKV_Format,
    bias_type: NVTE_Bias_Type,
    attn_mask_type: NVTE_Mask_Type,
    softmax_type: NVTE_Softmax_Type,
    window_size: tuple[int, int],
    bottom_right_diagonal: bool,
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
    """The same; the output may have a format of its own."""
    _check_formats(o_format, qkv_scale_inv_format, qkv_layout)
    return _forward(locals())


def _forward(call: dict[str, Any]) -> list[torch.Tensor]:
    names = ("page_table_k", "page_table_v", "s_quantizer", "o_quantizer", "Bias", "SoftmaxOffset")
    absent = all(call[name] is None for name in names) and not call["return_max_logit"]
    refuse_unless(absent, "fused_attn_fwd: paging, FP8, bias and the largest logit are not emulated")
    tensors, places = _checked(call), _places(call)
    state = torch.zeros(2, dtype=torch.int64)
    if places is None:
        return [*_attend(*tensors, call), state]
    output = torch.zeros_like(tensors[0], memory_format=torch.contiguous_format)
    statistics = torch.zeros(*output.shape[:2], 1)
    for place in places:
        part, sums = _attend(*(tensor[place, None] for tensor in tensors), call)
        output[place], statistics[place] = part[:, 0], sums[0].transpose(0, 1)
    return [output, statistics, state]


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(queries, keys, call)
    statistics = scores.logsumexp(-1, keepdim=True)
    by_head = _by_head(values, queries.shape[2])
    output = torch.einsum("bhst,bhtd->sbhd", (scores - statistics).exp(), by_head).to(queries.dtype).contiguous()
    return output, statistics


@kernel("cpp_extensions/fused_attn.py `fused_attn_bwd`", name="fused_attn_bwd")
def fused_attn_bwd_2_11(
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
    dqkv_type: DType,
    Aux_CTX_Tensors: list[torch.Tensor],
    cu_seqlens_q_padded: torch.Tensor | None,
    cu_seqlens_kv_padded: torch.Tensor | None,
    s_quantizer: Quantizer | None,
    dp_quantizer: Quantizer | None,
    dqkv_quantizer: Quantizer | None,
    cuda_graph: bool,
) -> list[torch.Tensor | None]:
    """Gradients of queries, keys, values; no bias, no softmax offset."""
    return _backward(locals())


@kernel("cpp_extensions/fused_attn.py `fused_attn_bwd`", name="fused_attn_bwd")
def fused_attn_bwd_2_17(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: NVTE_QKV_Layout,
    o_format: NVTE_QKV_Format,
    do_format: NVTE_QKV_Format,
    dqkv_layout: NVTE_QKV_Layout,
    qkv_scale_inv_format: NVTE_QKV_Format,
    do_scale_inv_format: NVTE_QKV_Format,
    bias_type: NVTE_Bias_Type,
    attn_mask_type: NVTE_Mask_Type,
    softmax_type: NVTE_Softmax_Type,
    window_size: tuple[int, int],
    bottom_right_diagonal: bool,
    deterministic: bool,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    O: torch.Tensor,  # noqa: E741
    dO: torch.Tensor,
    fake_dtype: torch.dtype,
    Aux_CTX_Tensors: list[torch.Tensor],
    cu_seqlens_q_padded: torch.Tensor | None,
    cu_seqlens_kv_padded: torch.Tensor | None,
    s_quantizer: Quantizer | None,
    dp_quantizer: Quantizer | None,
    dqkv_quantizer: Quantizer | None,
    cuda_graph: bool,
) -> list[torch.Tensor | None]:
    """The same; output, its gradient and the results may have formats of their own."""
    _check_formats(o_format, qkv_scale_inv_format, qkv_layout)
    _check_formats(do_format, do_scale_inv_format, qkv_layout)
    refuse_unless(dqkv_layout == qkv_layout, f"fused_attn_bwd: gradients in the layout {dqkv_layout!r}")
    return _backward(locals())


def _backward(call: dict[str, Any]) -> list[torch.Tensor | None]:
    in_fp8 = call["dqkv_quantizer"] is not None or call["dp_quantizer"] is not None
    refuse_unless(not in_fp8, "fused_attn_bwd: FP8 attention is not emulated")
    tensors, places = _checked(call), _places(call)
    output, gradient, statistics = call["O"], call["dO"], call["Aux_CTX_Tensors"][0]
    if places is None:
        return [*_gradients(*tensors, output, gradient, statistics, call), None, None]
    results = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
    for place in places:
        given = (tensor[place, None] for tensor in (*tensors, output, gradient))
        parts = _gradients(*given, statistics[place].transpose(0, 1)[None], call)
        for result, part in zip(results, parts, strict=True):
            result[place] = part[:, 0]
    return [*results, None, None]


def _gradients(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    gradient: torch.Tensor,
    statistics: torch.Tensor,
    call: dict[str, Any],
) -> list[torch.Tensor]:
    scale, heads, groups = call["attn_scale"], queries.shape[2], keys.shape[2]
    probabilities = (_scores(queries, keys, call) - statistics).exp()
    gradient = gradient.float().permute(1, 2, 0, 3)
    output = output.float().permute(1, 2, 0, 3)
    grad_values = probabilities.transpose(-1, -2) @ gradient
    grad_probabilities = gradient @ _by_head(values, heads).transpose(-1, -2)
    grad_scores = probabilities * (grad_probabilities - (gradient * output).sum(-1, keepdim=True)) * scale
    grad_queries = grad_scores @ _by_head(keys, heads)
    grad_keys = grad_scores.transpose(-1, -2) @ queries.float().permute(1, 2, 0, 3)
    results = (
        _sequence_first(grad_queries, heads),
        *(_sequence_first(part, groups) for part in (grad_keys, grad_values)),
    )
    return [result.to(queries.dtype) for result in results]


def _check_formats(format: NVTE_QKV_Format, scale_format: NVTE_QKV_Format, layout: NVTE_QKV_Layout) -> None:
    refuse_unless(format == format_of(layout), f"fused attention: format {format!r} is not emulated")
    refuse_unless(scale_format.name == NO_FORMAT, "fused attention: scales of FP8 numbers are not emulated")


def _checked(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a call that is emulated."""
    layout, mask, window = call["qkv_layout"], call["attn_mask_type"], call["window_size"]
    tensors = call["Q"], call["K"], call["V"]
    refuse_unless(layout in MASK_OF_LAYOUT, f"fused attention: layout {layout!r} is not emulated")
    in_parts = layout in SEQUENCE_FIRST and mask in MASKS_OF_PARTS
    ends = window[1] in (0, -1) if mask != NO_MASK else tuple(window) == (-1, -1)
    is_known = (mask == MASK_OF_LAYOUT[layout] or in_parts) and ends
    refuse_unless(is_known, f"fused attention: mask {mask!r}, window {window}")
    alike = layout in PACKED or in_parts or len(tensors[0]) == len(tensors[1])
    refuse_unless(alike, f"fused attention: mask {mask!r} of {len(tensors[0])} queries and {len(tensors[1])} keys")
    refuse_unless(call["p_dropout"] == 0.0, "fused attention: dropout is not emulated")
    for tensor in tensors:
        refuse_unless(tensor.dtype in (torch.bfloat16, torch.float16), f"fused attention in {tensor.dtype}")
        refuse_unless(tensor.stride(-1) == 1, "fused attention: the head's numbers do not lie side by side")
    if layout == NVTE_QKV_Layout["NVTE_SBHD_SBHD_SBHD"]:
        contiguous("fused attention, layout sbhd_sbhd_sbhd", *tensors)
    if layout == NVTE_QKV_Layout["NVTE_THD_THD_THD"]:
        contiguous("fused attention, layout thd_thd_thd", *tensors)
    return tensors


def _places(call: dict[str, Any]) -> list[slice] | None:
    """The place of each packed sequence; None: the layout is of sequences of one length."""
    if call["qkv_layout"] not in PACKED:
        return None
    lengths = call["cu_seqlens_q"]
    for side in ("q", "kv"):
        offsets = call[f"cu_seqlens_{side}_padded"]
        refuse_unless(offsets is not None, "fused attention: cu_seqlens_padded, which hold the offsets, are missing")
        refuse_unless(torch.equal(lengths, offsets), "fused attention: padding between sequences is not emulated")
    refuse_unless(torch.equal(lengths, call["cu_seqlens_kv"]), "fused attention: other lengths of keys")
    refuse_unless(call["max_seqlen_q"] == call["max_seqlen_kv"], "fused attention: another greatest length of keys")
    return sequences("fused attention", lengths, len(call["Q"]), call["max_seqlen_q"])


def _by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[sequence, batch, groups, dim] as fp32 [batch, heads, sequence, dim]: a group serves several heads."""
    return tensor.float().permute(1, 2, 0, 3).repeat_interleave(heads // tensor.shape[2], 1)


def _sequence_first(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[batch, heads, sequence, dim] as [sequence, batch, groups, dim], summed over the heads of a group."""
    batch, heads, sequence, dim = tensor.shape
    summed = tensor.view(batch, groups, heads // groups, sequence, dim).sum(2)
    return summed.permute(2, 0, 1, 3).contiguous()


def _scores(queries: torch.Tensor, keys: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
    scores = queries.float().permute(1, 2, 0, 3) @ _by_head(keys, queries.shape[2]).transpose(-1, -2)
    scores = scores * call["attn_scale"]
    if call["attn_mask_type"] == NO_MASK:
        return scores
    # Packed sequences have as many keys as queries.
    distance = torch.arange(len(keys) - len(queries), len(keys))[:, None] - torch.arange(len(keys))
    keep, left = distance >= 0, call["window_size"][0]
    return scores.masked_fill(~(keep & (distance <= left) if left >= 0 else keep), float("-inf"))
