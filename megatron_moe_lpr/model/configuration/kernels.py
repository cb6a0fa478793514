"""Which kernels compute the model on a platform: the launch defaults, each with its reason.

A kernel whose requirement is missing stays off. They have run emulated, never on a device (docs/gpu.md).
"""

from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend
from packaging.version import Version

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import GPUFacts, Platform

PERMUTE_FUSION = Version("2.1.0")
ROUTER_FUSION = Version("2.7.0")


def platform_fields(platform: Platform, dtype: torch.dtype, deterministic: bool = False) -> dict[str, Any]:
    """Fields of TransformerConfig that choose kernels for weights and activations of `dtype`.

    Args:
        deterministic: only kernels that add up in the same order in every run; on a CPU all do.
    """
    if not platform.on_gpus:
        # Outputs sent to the next pipeline rank are not freed: gloo still reads the memory when the send has returned.
        return {
            "transformer_impl": "local",
            "use_cpu_initialization": True,
            "attention_backend": AttnBackend.local,
            # SiLU, its gate and the expert's weight in few passes over memory (platform/torch_only/swiglu.py).
            "bias_activation_fusion": True,
            # bf16 products of few shapes (platform/cpu/expert_rows.py).
            "padded_expert_rows": dtype == torch.bfloat16,
        }
    if platform.gpu is None:
        raise ValueError("layers on a GPU need the facts about it")
    fields = _cuda_fields(dtype) if platform.transformer_engine else _local_cuda_fields(platform.gpu, dtype)
    # Megatron refuses its fused cross entropy together with this mode (training/arguments.py).
    return fields | {"deterministic_mode": True, "cross_entropy_loss_fusion": False} if deterministic else fields


def _local_cuda_fields(gpu: GPUFacts, dtype: torch.dtype) -> dict[str, Any]:
    """PyTorch alone: nothing that needs Transformer Engine, apex or a compiler at run time."""
    return {
        "transformer_impl": "local",
        "attention_backend": AttnBackend.local,
        # SwiGLU that keeps its input alone (platform/torch_only/swiglu.py).
        "bias_activation_fusion": True,
        # The products of all experts of a rank in one launch.
        "grouped_products": gpu.grouped_products and dtype == torch.bfloat16,
        "deallocate_pipeline_outputs": True,
    }


def _cuda_fields(dtype: torch.dtype) -> dict[str, Any]:
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
        "persist_layer_norm": True,
        # A stage's output is freed as soon as NCCL has sent it; the next stage holds the copy.
        "deallocate_pipeline_outputs": True,
    }


def chosen_kernels(platform: Platform, options: ComputeOptions) -> dict[str, Any]:
    """Fields of MoELPRConfig for kernels that a flag switches off. Empty where the platform has none of them."""
    if platform.gpu is None or not platform.transformer_engine:
        return {}
    installed, fuses = platform.gpu.transformer_engine or Version("0"), options.gradient_accumulation_fusion
    return {
        # Sorting tokens by expert in one kernel, instead of a gather per expert.
        "moe_permute_fusion": options.moe_permute_fusion and installed >= PERMUTE_FUSION,
        # softmax, top-k and renormalisation of the router in one kernel.
        "moe_router_fusion": options.moe_router_fusion and installed >= ROUTER_FUSION,
        # Weight gradients added to the fp32 buffer by the matrix product itself: by Transformer Engine's, and by those
        # of Megatron's own layers, the output matrix, for which apex's extension does it.
        "fuse_wgrad_accumulation": fuses,
        "gradient_accumulation_fusion": fuses and platform.gpu.fused_weight_gradients,
    }


def check_dispatcher(
    dispatcher: str, layout: ParallelLayout, max_experts: int, top_k: int, platform: Platform, backend: str = "deepep"
) -> None:
    """Check that the flex dispatcher can run: the backend's kernels, over more than one rank.

    Raises:
        UserError: naming what is missing.
    """
    if dispatcher != "flex":
        if backend != "deepep":
            raise UserError(f"--moe-flex-dispatcher-backend {backend}: needs --moe-token-dispatcher-type flex")
        return
    flag = "--moe-token-dispatcher-type flex"
    if platform.gpu is None:
        raise UserError(f"{flag} needs NVIDIA GPUs; leave it at alltoall")
    if not platform.gpu.deep_ep:
        raise UserError(f"{flag} needs the package deep_ep (DeepEP), which does not import; leave it at alltoall")
    if layout.expert_model_parallel_size * layout.expert_tensor_parallel_size == 1:
        raise UserError(f"{flag} needs --expert-model-parallel-size over 1; leave it at alltoall")
    if backend == "hybridep" and not platform.gpu.hybrid_ep:
        raise UserError(
            "--moe-flex-dispatcher-backend hybridep: needs HybridEPBuffer of the package deep_ep (DeepEP's branch "
            "hybrid-ep), which does not import; leave it at deepep"
        )
    # HybridEP takes a table of choices, DeepEP the k best of a token, with weight 0 where it has fewer new experts.
    if backend == "deepep" and max_experts - 1 < top_k:
        raise UserError(f"{flag}: top-{top_k} needs at least {top_k} new experts, and there are {max_experts - 1}")
