"""Context parallelism: how CP ranks exchange keys and values, and what Transformer Engine cannot compute over them."""

from typing import Any

import torch

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import Platform

REMEDY = "leave --context-parallel-size at 1, or take PyTorch's layers: --transformer-impl local"


def context_fields(layout: ParallelLayout, architecture: Architecture, platform: Platform) -> dict[str, Any]:
    """Fields of TransformerConfig. Transformer Engine sends keys and values around a ring, under attention; with a
    sliding window it can only gather them (context_parallel.py `attn_forward_func_with_cp`). Local layers gather them
    always (`model/transformer/local_attention.py`)."""
    fields: dict[str, Any] = {"context_parallel_size": layout.context_parallel_size}
    if layout.context_parallel_size > 1 and platform.transformer_engine:
        fields["cp_comm_type"] = "all_gather" if architecture.sliding_window else "p2p"
    return fields


def check_context_parallel(layout: ParallelLayout, platform: Platform, dtype: torch.dtype) -> None:
    """Check that the platform's attention can be split over CP ranks.

    Raises:
        UserError: naming the flags.
    """
    if layout.context_parallel_size > 1 and platform.transformer_engine and dtype == torch.float32:
        raise UserError(
            f"--context-parallel-size {layout.context_parallel_size}: Transformer Engine's attention in fp32 is not "
            f"split over ranks; compute in bf16 (--bf16), {REMEDY}"
        )


def check_documents_apart(layout: ParallelLayout, platform: Platform, apart: bool) -> None:
    """Check that attention can keep documents apart over CP ranks.

    Transformer Engine cuts each document into 2 x CP parts and so needs its length to be a multiple of that.

    Args:
        apart: documents of a sample do not see each other.

    Raises:
        UserError: naming the flags.
    """
    if apart and layout.context_parallel_size > 1 and platform.transformer_engine:
        raise UserError(
            f"--context-parallel-size {layout.context_parallel_size}: Transformer Engine splits documents kept "
            "apart (--reset-attention-mask, or best-fit packing without --no-pack-apart) only where the length of each "
            f"is a multiple of {2 * layout.context_parallel_size}; {REMEDY}"
        )
