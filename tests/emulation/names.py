"""Enumerations of Transformer Engine 2.11's compiled extension, and what its number formats are in PyTorch."""

import enum

import torch

EXTENSION = "transformer_engine_torch"


class DType(enum.IntEnum):
    """Number formats; tables of Transformer Engine are keyed by them (constants.py `TE_DType`)."""

    kByte = 0
    kInt16 = 1
    kInt32 = 2
    kInt64 = 3
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat8E8M0 = 9
    kFloat4E2M1 = 10


TORCH_DTYPE = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kInt64: torch.int64,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


def _enumeration(name: str, *members: str) -> type[enum.IntEnum]:
    return enum.IntEnum(name, {member: index for index, member in enumerate(members)})


# quantization.py, module/base.py: columns of the tables of scales
FP8FwdTensors = _enumeration(
    "FP8FwdTensors", *(f"GEMM{number}_{part}" for number in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT"))
)
FP8BwdTensors = _enumeration(
    "FP8BwdTensors", *(f"GRAD_{part}{number}" for number in (1, 2, 3) for part in ("OUTPUT", "INPUT"))
)
Float8BlockScaleTensorFormat = _enumeration("Float8BlockScaleTensorFormat", "COMPACT", "GEMM_READY")
CommOverlapType = _enumeration("CommOverlapType", "RS", "AG")

# cpp_extensions/fused_attn.py: tables from the names of layouts, masks and biases
_FORMATS = ("SBHD", "BSHD", "THD", "SBHD_2BSHD", "BSHD_2SBHD", "THD_2BSHD", "THD_2SBHD")
_LAYOUTS = [
    "SB3HD",
    "SBH3D",
    "SBHD_SB2HD",
    "SBHD_SBH2D",
    "SBHD_SBHD_SBHD",
    "BS3HD",
    "BSH3D",
    "BSHD_BS2HD",
    "BSHD_BSH2D",
    "BSHD_BSHD_BSHD",
    "T3HD",
    "TH3D",
    "THD_T2HD",
    "THD_TH2D",
    "THD_THD_THD",
    "SBHD_BSHD_BSHD",
    "BSHD_SBHD_SBHD",
    "THD_BSHD_BSHD",
    "THD_SBHD_SBHD",
    "Paged_KV_BSHD_BSHD_BSHD",
    "Paged_KV_BSHD_SBHD_SBHD",
    "Paged_KV_SBHD_BSHD_BSHD",
    "Paged_KV_SBHD_SBHD_SBHD",
    "Paged_KV_THD_BSHD_BSHD",
    "Paged_KV_THD_SBHD_SBHD",
]
_MASKS = [
    "NO_MASK",
    "PADDING_MASK",
    "CAUSAL_MASK",
    "PADDING_CAUSAL_MASK",
    "CAUSAL_BOTTOM_RIGHT_MASK",
    "PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
]
NVTE_QKV_Format = _enumeration("NVTE_QKV_Format", *(f"NVTE_{name}" for name in _FORMATS))
NVTE_QKV_Layout = _enumeration("NVTE_QKV_Layout", *(f"NVTE_{name}" for name in _LAYOUTS))
NVTE_Mask_Type = _enumeration("NVTE_Mask_Type", *(f"NVTE_{name}" for name in _MASKS))
NVTE_Bias_Type = _enumeration(
    "NVTE_Bias_Type", "NVTE_NO_BIAS", "NVTE_PRE_SCALE_BIAS", "NVTE_POST_SCALE_BIAS", "NVTE_ALIBI"
)
NVTE_Softmax_Type = _enumeration(
    "NVTE_Softmax_Type", "NVTE_VANILLA_SOFTMAX", "NVTE_OFF_BY_ONE_SOFTMAX", "NVTE_LEARNABLE_SOFTMAX"
)
NVTE_Fused_Attn_Backend = _enumeration(
    "NVTE_Fused_Attn_Backend",
    "NVTE_F16_max512_seqlen",
    "NVTE_F16_arbitrary_seqlen",
    "NVTE_FP8",
    "NVTE_No_Backend",
)

ENUMERATIONS = (
    DType,
    FP8FwdTensors,
    FP8BwdTensors,
    Float8BlockScaleTensorFormat,
    CommOverlapType,
    NVTE_QKV_Format,
    NVTE_QKV_Layout,
    NVTE_Mask_Type,
    NVTE_Bias_Type,
    NVTE_Softmax_Type,
    NVTE_Fused_Attn_Backend,
)
