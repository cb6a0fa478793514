"""What an import tells the user about the export, when the layers are chosen and not after training."""

from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.card import CheckpointCard
from megatron_moe_lpr.conversion.hugging_face.hf_directory import open_hf_directory
from megatron_moe_lpr.conversion.tensors.extra_tensors import equal_expert_bytes
from megatron_moe_lpr.conversion.tensors.names import MOE_LAYOUTS


def import_notes(hf: Path, card: CheckpointCard) -> list[str]:
    """Notes for the user; usually none.

    Args:
        hf: the directory that was imported.
        card: of the checkpoint.
    """
    return [*_equal_experts(hf, card), *_other_dtypes(hf, card)]


def _other_dtypes(hf: Path, card: CheckpointCard) -> list[str]:
    model, dtype = open_hf_directory(hf), getattr(torch, card.dtype)
    tensors = model.source().tensors
    other = [name for name, info in tensors.items() if len(info.shape) == 1 and info.dtype != dtype]
    if not other:
        return []
    return [
        f"{len(other)} norms and biases are stored in another dtype than the matrices' {card.dtype} and keep it, "
        f"{other[0]} for one; training computes with all weights in one dtype, as transformers does"
    ]


def _equal_experts(hf: Path, card: CheckpointCard) -> list[str]:
    dense = sum(experts == 1 for experts in card.experts_per_layer)
    if not card.is_moe or not dense:
        return []
    architecture = open_hf_directory(hf).architecture
    itemsize = getattr(torch, card.dtype).itemsize
    # llama.cpp's forms have experts everywhere, in Mixtral's sizes.
    extra = equal_expert_bytes(architecture, card.experts_per_layer, MOE_LAYOUTS["mixtral"], itemsize)
    stock = MOE_LAYOUTS[architecture.family.moe_model_type]
    what = architecture.family.moe_architecture if stock.experts_everywhere else "llama.cpp's form"
    return [
        f"{what} has experts in every layer: an export writes each of the {dense} dense layers as {card.num_experts} "
        f"equal experts, which computes the same and takes {extra:,} bytes more"
    ]
