"""Which attention kernel there is for a shape, as Transformer Engine 2.11, 2.17 and 2.20 ask."""

from typing import Any

from tests.emulation.fused_attention import MASK_OF_LAYOUT, MASKS_OF_PARTS, SEQUENCE_FIRST, format_of
from tests.emulation.kernels import kernel
from tests.emulation.names import (
    DType,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
)
from tests.emulation.table import check_for

HALF = (DType["kBFloat16"], DType["kFloat16"])
LARGEST_HEAD = 256
# csrc/extensions/attention.cpp `get_fused_attn_backend`: what is read of a FusedAttentionParams
PARAMETERS = {
    "bool": ("is_training", "deterministic", "cuda_graph", "return_max_logit", "bottom_right_diagonal"),
    "float": ("dropout", "attn_scale"),
    "DType": ("qkv_dtype", "o_dtype", "do_dtype", "dqkv_dtype"),
    "NVTE_Mask_Type": ("attn_mask_type",),
    "NVTE_Bias_Type": ("bias_type",),
    "NVTE_Softmax_Type": ("softmax_type",),
    "NVTEScalingMode": ("scaling_mode",),
    "NVTE_QKV_Layout": ("qkv_layout", "dqkv_layout"),
    "NVTE_QKV_Format": ("o_format", "do_format", "qkv_scale_inv_format", "do_scale_inv_format"),
    "int": (
        *("window_size_left", "window_size_right", "batch_size", "num_attn_heads", "num_gqa_groups", "head_dim_qk"),
        *("head_dim_v", "max_seqlen_q", "max_seqlen_kv", "num_tokens_q", "num_tokens_kv", "num_pages_k", "num_pages_v"),
        *("page_size_k", "page_size_v", "max_pages_per_seq_k", "max_pages_per_seq_v", "bias_batch_size"),
        *("bias_num_heads", "bias_seqlen_q", "bias_seqlen_kv"),
    ),
}


def _backend(facts: dict[str, Any]) -> NVTE_Fused_Attn_Backend:
    """cuDNN's kernel where it has one: half precision, heads of a multiple of 8 up to 256, causal, no bias;
    sequences of one length, or packed ones; parts of sequences, as context parallelism has them."""
    in_parts = facts["qkv_layout"] in SEQUENCE_FIRST and facts["attn_mask_type"] in MASKS_OF_PARTS
    fits = (
        facts["q_dtype"] == facts["kv_dtype"]
        and facts["q_dtype"] in HALF
        and facts["qkv_layout"] in MASK_OF_LAYOUT
        and facts["bias_type"] == NVTE_Bias_Type["NVTE_NO_BIAS"]
        and (in_parts or facts["attn_mask_type"] == MASK_OF_LAYOUT[facts["qkv_layout"]])
        and facts["softmax_type"] == NVTE_Softmax_Type["NVTE_VANILLA_SOFTMAX"]
        and facts["head_dim_qk"] == facts["head_dim_v"]
        and facts["head_dim_qk"] % 8 == 0
        and facts["head_dim_qk"] <= LARGEST_HEAD
        and facts["num_attn_heads"] % facts["num_gqa_groups"] == 0
        and (in_parts or facts["max_seqlen_q"] == facts["max_seqlen_kv"])
        and not facts["return_max_logit"]
    )
    return NVTE_Fused_Attn_Backend["NVTE_F16_arbitrary_seqlen" if fits else "NVTE_No_Backend"]


@kernel("attention/dot_product_attention/utils.py `get_attention_backend`", name="get_fused_attn_backend")
def get_fused_attn_backend_2_11(
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
    """Which kernel computes the attention that is described."""
    return _backend(locals())


@kernel("attention/dot_product_attention/utils.py `get_attention_backend`", name="get_fused_attn_backend")
def get_fused_attn_backend_2_17(
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
    deterministic: bool,
) -> NVTE_Fused_Attn_Backend:
    """The same."""
    return _backend(locals())


@kernel("attention/dot_product_attention/utils.py `get_attention_backend`", name="get_fused_attn_backend")
def get_fused_attn_backend_2_20(fused_attn_params: object) -> tuple[NVTE_Fused_Attn_Backend, str]:
    """The same, and why there is none; the description is a FusedAttentionParams."""
    for kind, names in PARAMETERS.items():
        for name in names:
            value = getattr(fused_attn_params, name)
            if not check_for(kind)(value):
                raise TypeError(f"get_fused_attn_backend: {name} is {kind}, not {type(value).__name__}")
    facts = {name: getattr(fused_attn_params, name) for names in PARAMETERS.values() for name in names}
    usual = format_of(facts["qkv_layout"])
    backend = _backend(facts | {"q_dtype": facts["qkv_dtype"], "kv_dtype": facts["qkv_dtype"]})
    if facts["o_format"] != usual or facts["do_format"] != usual or facts["dqkv_layout"] != facts["qkv_layout"]:
        backend = NVTE_Fused_Attn_Backend["NVTE_No_Backend"]
    none = backend == NVTE_Fused_Attn_Backend["NVTE_No_Backend"]
    return backend, "not one of those that are emulated" if none else ""
