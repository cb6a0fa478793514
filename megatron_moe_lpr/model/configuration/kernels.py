"""Which kernels compute the model on a platform: the launch defaults, each with its reason.

A kernel whose requirement is missing stays off. They have run emulated, never on a device (docs/gpu.md).
"""

from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend
from packaging.version import Version

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import GPUFacts, Platform

PERMUTE_FUSION = Version("2.1.0")
ROUTER_FUSION = Version("2.7.0")


def platform_fields(platform: Platform, dtype: torch.dtype, deterministic: bool = False) -> dict[str, Any]:
    """Fields of TransformerConfig that choose kernels for weights and activations of `dtype`.

    Args:
        deterministic: only kernels that add up in the same order in every run; on a CPU all do.
    """
    if not platform.transformer_engine:
        # Outputs sent to the next pipeline rank are not freed: gloo still reads the memory when the send has returned.
        return {
            "transformer_impl": "local",
            "use_cpu_initialization": True,
            "attention_backend": AttnBackend.local,
            # SiLU, its gate and the expert's weight in few passes over memory (platform/cpu/activations.py).
            "bias_activation_fusion": True,
        }
    if platform.gpu is None:
        raise ValueError("Transformer Engine's layers need the facts about the GPU")
    fields = _cuda_fields(platform.gpu, dtype)
    # Megatron refuses its fused cross entropy together with this mode (training/arguments.py).
    return fields | {"deterministic_mode": True, "cross_entropy_loss_fusion": False} if deterministic else fields


def _cuda_fields(gpu: GPUFacts, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "transformer_impl": "transformer_engine",
        # Transformer Engine picks cuDNN's or Flash Attention by shape and device.
        "attention_backend": AttnBackend.auto,
        # One kernel instead of five for the rotary embedding; Transformer Engine has it.
        "apply_rope_fusion": True,
        # SiLU, its gate and the expert's weight in one kernel, compiled by torch.
        "bias_activation_fusion": True,
        # The loss over the vocabulary without a second copy of the logits, compiled by torch. Megatron's function
        # rounds the gradients to bf16, whatever the logits are (fused_cross_entropy.py `calculate_gradients`).
        "cross_entropy_loss_fusion": dtype == torch.bfloat16,
        "cross_entropy_fusion_impl": "native",
        # Sorting tokens by expert in one kernel, instead of a gather per expert.
        "moe_permute_fusion": gpu.transformer_engine >= PERMUTE_FUSION,
        # softmax, top-k and renormalisation of the router in one kernel.
        "moe_router_fusion": gpu.transformer_engine >= ROUTER_FUSION,
        "persist_layer_norm": True,
        # Weight gradients added to the fp32 buffer by the matrix product itself; apex's extension does it.
        "gradient_accumulation_fusion": gpu.fused_weight_gradients,
        # A stage's output is freed as soon as NCCL has sent it; the next stage holds the copy.
        "deallocate_pipeline_outputs": True,
    }


def check_dispatcher(dispatcher: str, layout: ParallelLayout, max_experts: int, top_k: int, platform: Platform) -> None:
    """Check that the flex dispatcher can run: DeepEP's kernels, over more than one rank.

    Raises:
        UserError: naming what is missing.
    """
    if dispatcher != "flex":
        return
    flag = "--moe-token-dispatcher-type flex"
    if platform.gpu is None:
        raise UserError(f"{flag} needs NVIDIA GPUs; leave it at alltoall")
    if not platform.gpu.deep_ep:
        raise UserError(f"{flag} needs the package deep_ep (DeepEP), which does not import; leave it at alltoall")
    if layout.expert_model_parallel_size * layout.expert_tensor_parallel_size == 1:
        raise UserError(f"{flag} needs --expert-model-parallel-size over 1; leave it at alltoall")
    if max_experts - 1 < top_k:
        raise UserError(f"{flag}: top-{top_k} needs at least {top_k} new experts, and there are {max_experts - 1}")
