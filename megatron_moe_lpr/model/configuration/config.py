"""Megatron's TransformerConfig from what the checkpoint knows and what the run chooses."""

import dataclasses
import functools
import math
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.megatron.overriding import overrides_megatron
from megatron_moe_lpr.megatron.versions import without_cuda_graphs
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.context import check_context_parallel, context_fields
from megatron_moe_lpr.model.configuration.dtype import check_dtype_device
from megatron_moe_lpr.model.configuration.families import FAMILIES, NO_MULTIPLIERS, Family, Multipliers
from megatron_moe_lpr.model.configuration.fp8 import check_fp8_device, check_fp8_flags, check_fp8_shapes
from megatron_moe_lpr.model.configuration.kernels import check_dispatcher, chosen_kernels, platform_fields
from megatron_moe_lpr.model.configuration.parameters import Parameter, describe_model
from megatron_moe_lpr.model.configuration.recompute import check_recompute
from megatron_moe_lpr.model.transformer.rope import attention_factor
from megatron_moe_lpr.parallel.experts import check_expert_parallel, check_mixture_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import Platform

LPRLossForm = Literal["paper", "reference"]


@overrides_megatron
@dataclasses.dataclass
class MoELPRConfig(TransformerConfig):
    """Megatron's configuration, with the coefficients of the router's losses in the paper's units."""

    load_balancing_coeff: float = 0.0
    """Weight of the load balancing loss, the mean over MoE layers of N * sum_i f_i P_i."""
    lpr_loss_coeff: float = 0.0
    """Weight of the LPR loss, the mean over MoE layers and tokens of original languages."""
    lpr_loss_form: LPRLossForm = "paper"
    new_token_loss_coeff: float = 0.0
    """Weight of the new-token loss, the mean over tokens of original languages of -log(1 - mass on new tokens)."""
    num_moe_layers: int = 0
    original_expert_overlap: bool = False
    """Compute the original expert during the all-to-all of the new experts."""
    fp8_new_expert_parameters: bool = False
    """Keep only the new experts' weights in FP8; Megatron's own `fp8_param` means every matrix."""
    fuse_wgrad_accumulation: bool = False
    """Transformer Engine's layers add weight gradients to the gradient buffer themselves. Megatron's own
    `gradient_accumulation_fusion` also means Megatron's layers, which need NVIDIA apex for it."""
    padded_expert_rows: bool = False
    """Pad the original expert's rows to few sizes, as those of the new experts are on the CPU platform in bf16."""
    grouped_products: bool = False
    """Local layers multiply the matrices of several experts in one launch."""
    family: Family = FAMILIES["llama"]
    """What the layers compute, where Megatron has no field for it."""
    multipliers: Multipliers = NO_MULTIPLIERS


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes and the routing of a model, all read from its checkpoint."""

    architecture: Architecture
    experts_per_layer: tuple[int, ...]
    """Experts of each layer, the original ones counted; 1 is a dense layer."""
    top_k: int = 2
    expansions: tuple[tuple[int, ...], ...] = ()
    """New experts of each layer by expansion, the first one first; empty: one expansion added them all."""
    newest_weight: float = 1.0
    """Weight of the latest expansion's experts in the routers' softmax, 0 to 1."""
    inserted_blocks: tuple[int, ...] = ()
    """Dense layers that block expansion inserted."""
    new_tokens: tuple[int, ...] = ()
    """Rows that each vocabulary extension added, the oldest one first. Their ids follow the base model's. An expansion
    that leaves the vocabulary as it is counts as an extension of 0 rows: the rows before it are frozen."""

    @property
    def total_vocab_size(self) -> int:
        """Number of token ids: the base model's rows, `architecture.vocab_size`, and all new ones."""
        return self.architecture.vocab_size + sum(self.new_tokens)

    @property
    def has_new_rows(self) -> bool:
        """The latest expansion or import added rows to the vocabulary, which train."""
        return bool(self.new_tokens and self.new_tokens[-1])

    @property
    def num_groups(self) -> int:
        """Number of language groups: the original languages, and those of each expansion."""
        return 1 + max(1, len(self.expansions))

    def base_experts(self, layer: int) -> int:
        """Original experts of a layer: 1, or all that a mixture base has."""
        return self.architecture.base_experts(layer)

    def expert_groups(self, layer: int) -> tuple[int, ...]:
        """New experts of a layer by expansion."""
        added = tuple(added[layer] for added in self.expansions)
        return added or (self.experts_per_layer[layer] - self.base_experts(layer),)

    def dispatched_groups(self, layer: int) -> tuple[int, ...]:
        """Experts of a layer that are spread over EP ranks: a mixture base's, earlier expansions', the latest one's.

        Numbers of 0 are left out, except that of the latest. A single original expert is on every rank.
        """
        base, groups = self.base_experts(layer), self.expert_groups(layer)
        return *filter(None, (base if base > 1 else 0, sum(groups[:-1]))), groups[-1]

    def earlier_experts(self, layer: int) -> int:
        """New experts of a layer that expansions before the latest one added; they never train again."""
        return sum(self.expert_groups(layer)[:-1])

    @property
    def max_experts(self) -> int:
        """Experts of the largest layer; 1 for a dense model."""
        return max(self.experts_per_layer)

    @property
    def num_moe_layers(self) -> int:
        """Layers with a router."""
        return sum(experts > 1 for experts in self.experts_per_layer)

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All parameters of the model; those of inserted blocks are of the kind INSERTED_BLOCKS."""
        experts, blocks = self.experts_per_layer, self.inserted_blocks
        return tuple(describe_model(self.architecture, experts, self.expansions, blocks, self.new_tokens))


def transformer_config(
    shape: ModelShape, layout: ParallelLayout, platform: Platform, options: ComputeOptions, **overrides: Any
) -> MoELPRConfig:
    """Build the configuration and check that layout, model, options and platform fit each other.

    Args:
        overrides: further MoELPRConfig fields, for example loss coefficients.

    Raises:
        UserError: something does not fit.
    """
    check_layout(shape, layout)
    check_options(shape, layout, options)
    check_platform(shape, layout, options, platform)
    fields = _architecture_fields(shape.architecture)
    fields |= _expert_fields(shape, options) | _layout_fields(layout, options.dtype)
    fields |= _recompute_fields(options)
    fields |= platform_fields(platform, options.dtype, options.deterministic_mode) | chosen_kernels(platform, options)
    fields |= options.fp8.transformer_fields() | context_fields(layout, shape.architecture, platform)
    if shape.architecture.family.rotary_interleaved:
        # Transformer Engine's kernel for neighbouring dimensions has never run here.
        fields["apply_rope_fusion"] = False
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
        is_mixture=architecture.mixture is not None,
    )
    if architecture.mixture and architecture.mixture.shared_expert_size % layout.tensor_model_parallel_size:
        raise UserError(
            f"--tensor-model-parallel-size {layout.tensor_model_parallel_size} does not divide the shared expert's "
            f"{architecture.mixture.shared_expert_size} columns"
        )
    for layer in range(architecture.num_layers):
        if shape.base_experts(layer) > 1:
            groups = shape.expert_groups(layer)
            check_mixture_parallel(
                shape.base_experts(layer), (sum(groups[:-1]), groups[-1]), layout.expert_model_parallel_size
            )
        elif shape.earlier_experts(layer):
            # Each rank holds its share of the earlier experts and of the latest ones.
            for count in (shape.earlier_experts(layer), shape.expert_groups(layer)[-1]):
                check_expert_parallel(count, layout.expert_model_parallel_size)


def check_options(
    shape: ModelShape, layout: ParallelLayout, options: ComputeOptions, tokens: int | None = None
) -> None:
    """Check the options against model and layout, without a device.

    Args:
        tokens: tokens of a micro-batch; None: not known here. CP ranks share them.

    Raises:
        UserError: naming the flag.
    """
    check_fp8_flags(options.fp8, options.dtype)
    check_recompute(
        options.recompute_granularity,
        options.recompute_num_layers,
        options.recompute_modules,
        options.fp8,
        options.recompute_method,
        shape.architecture.num_layers
        // (layout.pipeline_model_parallel_size * layout.num_virtual_stages_per_pipeline_rank),
    )
    check_fp8_shapes(options.fp8, shape.architecture, layout, tokens)
    if options.original_expert_overlap and shape.max_experts == 1:
        raise UserError("--original-expert-overlap: the checkpoint is dense, it has no experts; leave the flag out")
    if options.original_expert_overlap and shape.architecture.mixture:
        raise UserError(
            "--original-expert-overlap: the base model is a mixture, whose experts are spread over EP ranks like the "
            "new ones; leave the flag out"
        )


def check_platform(shape: ModelShape, layout: ParallelLayout, options: ComputeOptions, platform: Platform) -> None:
    """Check that the platform can compute the model this way.

    Raises:
        UserError: naming the flag.
    """
    check_dtype_device(options.dtype, platform)
    check_fp8_device(options.fp8, platform)
    check_context_parallel(layout, platform, options.dtype)
    dispatcher, backend = options.moe_token_dispatcher_type, options.moe_flex_dispatcher_backend
    check_dispatcher(dispatcher, layout, shape.max_experts, shape.top_k, platform, backend)
    if options.deterministic_mode and dispatcher == "flex":
        raise UserError("--deterministic-mode: the order of DeepEP's sums is not known; use the dispatcher alltoall")


def _architecture_fields(architecture: Architecture) -> dict[str, Any]:
    window, family = architecture.sliding_window, architecture.family
    with_window = [layer not in architecture.full_attention_layers for layer in range(architecture.num_layers)]
    return {
        "family": family,
        "multipliers": architecture.multipliers,
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.head_dim,
        "layernorm_epsilon": architecture.norm_epsilon,
        "add_qkv_bias": family.qkv_bias,
        "qk_layernorm": family.qk_norm == "heads",
        "rotary_interleaved": family.rotary_interleaved,
        "softmax_scale": _softmax_scale(architecture),
        # Megatron's window excludes the token itself, Hugging Face's counts it.
        "window_size": (window - 1, 0) if window else None,
        "window_attn_skip_freq": [int(has) for has in with_window] if architecture.full_attention_layers else None,
        "no_rope_freq": [int(not has) for has in with_window] if architecture.full_attention_layers else None,
        "normalization": family.normalization,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        **without_cuda_graphs(),
        # Every weight comes from a checkpoint.
        "perform_initialization": False,
    }


def _softmax_scale(architecture: Architecture) -> float | None:
    """Yarn scales rotated queries and keys; their product is scaled by the square, in every attention kernel."""
    factor, given = attention_factor(architecture.rope), architecture.multipliers.attention
    if factor == 1.0:
        return given
    return factor**2 * (1 / math.sqrt(architecture.head_dim) if given is None else given)


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
        "moe_router_pre_softmax": _weights_are_probabilities(shape),
        **_shared_expert_fields(shape.architecture),
        "moe_token_dispatcher_type": options.moe_token_dispatcher_type,
        "moe_flex_dispatcher_backend": options.moe_flex_dispatcher_backend,
        "original_expert_overlap": options.original_expert_overlap,
        "moe_grouped_gemm": True,
    }


def _weights_are_probabilities(shape: ModelShape) -> bool:
    """Whether the weights of a token's experts are their probabilities among all experts, and need not add up to 1."""
    mixture = shape.architecture.mixture
    # Renormalising one probability would make every weight 1 and hide the router from the loss.
    return not mixture.renormalised if mixture else shape.top_k == 1


def _shared_expert_fields(architecture: Architecture) -> dict[str, Any]:
    size = architecture.mixture.shared_expert_size if architecture.mixture else 0
    return {"moe_shared_expert_intermediate_size": size, "moe_shared_expert_gate": True} if size else {}


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
    modules, full = options.recompute_modules, options.recompute_granularity == "full"
    return {
        "recompute_granularity": options.recompute_granularity,
        "recompute_method": options.recompute_method or ("uniform" if full else None),
        "recompute_num_layers": options.recompute_num_layers or (1 if full else None),
        "recompute_modules": list(modules) if modules is not None else None,
    }
