"""Enumerations of Transformer Engine's compiled extension, and what its number formats are in PyTorch."""

import torch

from tests.emulation.table import ENUMERATIONS

EXTENSION = "transformer_engine_torch"

DType = ENUMERATIONS["DType"]
"""Number formats; tables of Transformer Engine are keyed by them (constants.py `TE_DType`)."""
Float8BlockScaleTensorFormat = ENUMERATIONS["Float8BlockScaleTensorFormat"]
NVTE_Bias_Type = ENUMERATIONS["NVTE_Bias_Type"]
NVTE_Fused_Attn_Backend = ENUMERATIONS["NVTE_Fused_Attn_Backend"]
NVTE_Mask_Type = ENUMERATIONS["NVTE_Mask_Type"]
NVTE_QKV_Format = ENUMERATIONS["NVTE_QKV_Format"]
NVTE_QKV_Layout = ENUMERATIONS["NVTE_QKV_Layout"]
NVTE_Softmax_Type = ENUMERATIONS["NVTE_Softmax_Type"]

TORCH_DTYPE = {
    DType["kByte"]: torch.uint8,
    DType["kInt32"]: torch.int32,
    DType["kFloat32"]: torch.float32,
    DType["kFloat16"]: torch.float16,
    DType["kBFloat16"]: torch.bfloat16,
    DType["kFloat8E4M3"]: torch.float8_e4m3fn,
    DType["kFloat8E5M2"]: torch.float8_e5m2,
}
