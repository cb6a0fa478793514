"""Megatron's TransformerConfig from what the checkpoint knows and what the run chooses."""

import dataclasses
from typing import Any, Literal

import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe_lpr.model.architecture import Architecture
from megatron_moe_lpr.model.losses import LPRLossForm
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import Platform


@dataclasses.dataclass
class MoELPRConfig(TransformerConfig):
    """Megatron's configuration and the router's losses, in the paper's units."""

    load_balancing_coeff: float = 0.0
    """Weight of the load balancing loss, the mean over MoE layers of N * sum_i f_i P_i."""
    lpr_loss_coeff: float = 0.0
    """Weight of the LPR loss, the mean over MoE layers and tokens of original languages."""
    lpr_loss_form: LPRLossForm = "paper"
    num_moe_layers: int = 0


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Everything about the model that a checkpoint fixes."""

    architecture: Architecture
    experts_per_layer: tuple[int, ...]
    """Experts of each layer, the original one counted; 1 is a dense layer."""
    top_k: int = 2

    @property
    def max_experts(self) -> int:
        """Experts of the largest layer; 1 for a dense model."""
        return max(self.experts_per_layer)

    @property
    def num_moe_layers(self) -> int:
        """Layers with a router."""
        return sum(experts > 1 for experts in self.experts_per_layer)


@dataclasses.dataclass(frozen=True)
class ComputeOptions:
    """How a run computes the model; nothing here changes what it computes beyond rounding."""

    dtype: torch.dtype = torch.float32
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[str, ...] | None = None


def transformer_config(
    shape: ModelShape, layout: ParallelLayout, platform: Platform, options: ComputeOptions, **overrides: Any
) -> MoELPRConfig:
    """Build the configuration and check that the layout fits the model.

    Args:
        overrides: further MoELPRConfig fields, for example loss coefficients.

    Raises:
        UserError: the layout does not fit.
    """
    check_layout(shape, layout)
    fields = _architecture_fields(shape.architecture)
    fields |= _expert_fields(shape, options) | _layout_fields(layout, options.dtype)
    fields |= _recompute_fields(options) | _platform_fields(platform)
    return MoELPRConfig(**(fields | overrides))


def check_layout(shape: ModelShape, layout: ParallelLayout) -> None:
    """Check the model's dimensions against the layout.

    Raises:
        UserError: naming what does not fit and what would.
    """
    architecture = shape.architecture
    layout.check_model(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        experts_per_layer=shape.experts_per_layer,
    )


def _architecture_fields(architecture: Architecture) -> dict[str, Any]:
    window = architecture.sliding_window
    return {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.head_dim,
        "layernorm_epsilon": architecture.norm_epsilon,
        "add_qkv_bias": architecture.family.qkv_bias,
        "qk_layernorm": architecture.family.qk_norm,
        # Megatron's window excludes the token itself, Hugging Face's counts it.
        "window_size": (window - 1, 0) if window else None,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "cuda_graph_scope": [],
        # Every weight comes from a checkpoint.
        "perform_initialization": False,
    }


def _expert_fields(shape: ModelShape, options: ComputeOptions) -> dict[str, Any]:
    if shape.max_experts == 1:
        return {}
    return {
        "num_moe_experts": shape.max_experts,
        "num_moe_layers": shape.num_moe_layers,
        "moe_layer_freq": [int(experts > 1) for experts in shape.experts_per_layer],
        "moe_ffn_hidden_size": shape.architecture.ffn_hidden_size,
        "moe_router_topk": shape.top_k,
        "moe_router_dtype": "fp32",
        # Renormalising one probability would make every weight 1 and hide the router from the loss.
        "moe_router_pre_softmax": shape.top_k == 1,
        "moe_token_dispatcher_type": options.moe_token_dispatcher_type,
        "moe_grouped_gemm": True,
    }


def _layout_fields(layout: ParallelLayout, dtype: torch.dtype) -> dict[str, Any]:
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    return {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_model_parallel_size,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size,
        "sequence_parallel": layout.uses_sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _recompute_fields(options: ComputeOptions) -> dict[str, Any]:
    modules = options.recompute_modules
    return {
        "recompute_granularity": options.recompute_granularity,
        "recompute_method": options.recompute_method,
        "recompute_num_layers": options.recompute_num_layers,
        "recompute_modules": list(modules) if modules is not None else None,
    }


def _platform_fields(platform: Platform) -> dict[str, Any]:
    if platform.transformer_engine:
        return {
            "attention_backend": AttnBackend.auto,
            "apply_rope_fusion": True,
            "bias_activation_fusion": True,
            "moe_permute_fusion": True,
            "persist_layer_norm": True,
            "deallocate_pipeline_outputs": True,
        }
    # Outputs sent to the next pipeline stage are not freed: gloo still reads the memory when the send has returned.
    return {"transformer_impl": "local", "use_cpu_initialization": True, "attention_backend": AttnBackend.local}
