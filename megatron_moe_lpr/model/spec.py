"""Layer specifications: Megatron's local layers on CPU, Transformer Engine's on CUDA, with the same checkpoint keys."""

import dataclasses
from collections.abc import Sequence

from megatron.core import parallel_state
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset

from megatron_moe_lpr.megatron.overriding import replace
from megatron_moe_lpr.model.configuration.config import ModelShape, MoELPRConfig
from megatron_moe_lpr.model.moe.expert_groups import ExpertGroups
from megatron_moe_lpr.model.moe.expert_states import grouped_linear_layers
from megatron_moe_lpr.model.moe.grouped_linear import ColumnParallelGroupedLinear, RowParallelGroupedLinear
from megatron_moe_lpr.model.moe.moe_layer import MoELPRLayer, MoELPRSubmodules
from megatron_moe_lpr.model.moe.router import LPRRouter
from megatron_moe_lpr.model.transformer.all_heads_attention import KEYS as ALL_HEADS_KEYS
from megatron_moe_lpr.model.transformer.all_heads_attention import AllHeadsAttention
from megatron_moe_lpr.model.transformer.local_attention import LocalAttention
from megatron_moe_lpr.model.transformer.norm import LayerNorm, RMSNorm
from megatron_moe_lpr.model.transformer.parallel_layer import ParallelLayer
from megatron_moe_lpr.model.transformer.residual import OutputAlone, ResidualBranch

# In the local specification TransformerLayer saves `pre_mlp_layernorm` under the key of a dense layer's fused norm.
# Without this entry in MoE layers, both specifications save `pre_mlp_layernorm.weight`.
NORM_OF_DENSE_LAYER = "pre_mlp_layernorm."
NORMS_OF_OUTPUTS = {
    "self_attn_bda.layernorm.": "post_self_attn_layernorm.",
    "mlp_bda.layernorm.": "post_mlp_layernorm.",
}
"""Keys of the norms of `ResidualBranch` in a checkpoint."""


def block_spec(
    config: MoELPRConfig,
    shape: ModelShape,
    transformer_engine: bool,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline rank's model or model chunk.

    Args:
        shape: shape of the whole model.
        transformer_engine: Transformer Engine's layers instead of Megatron's local ones.
        vp_stage: number of the model chunk in an interleaved pipeline (Megatron's term), else None.
    """
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    first = get_transformer_layer_offset(config, vp_stage, pipeline_rank)
    count = get_num_layers_to_build(config, vp_stage, pipeline_rank)
    layer = _transformer_engine_layer if transformer_engine else _local_layer
    layers = [layer(config, shape.experts_per_layer[index]) for index in range(first, first + count)]
    for spec in layers:
        _as_the_family_computes(spec, config, transformer_engine)
    for index, spec in enumerate(layers, start=first):
        if shape.experts_per_layer[index] > 1 and len(shape.dispatched_groups(index)) > 1:
            _with_groups(spec.submodules.mlp, shape, index)
    if config.fp8 and config.fp8_new_expert_parameters:
        _keep_new_experts_in_fp8(config, layers, first)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_norm(config, transformer_engine))


def _keep_new_experts_in_fp8(config: TransformerConfig, layers: Sequence[ModuleSpec], first: int) -> None:
    """Keep the new experts' weights in FP8, in all layers but those that compute in bf16.

    A layer itself does not know its number in the whole model, which decides that.
    """
    for index, layer in enumerate(layers, start=first):
        mlp = layer.submodules.mlp
        if mlp.module is MoELPRLayer and not is_first_last_bf16_layer(config, index):
            mlp.params["fp8_parameters"] = True


def _with_groups(mlp: ModuleSpec, shape: ModelShape, layer: int) -> None:
    """Compute a mixture base's experts, those of earlier expansions and the latest one's by separate products."""
    base, groups = shape.base_experts(layer), shape.expert_groups(layer)
    mlp.params |= {"groups": groups, "newest_weight": shape.newest_weight, "base": base if base > 1 else 0}
    grouped = mlp.submodules.experts
    counts = {"base": mlp.params["base"], "earlier": sum(groups[:-1]), "newest": groups[-1]}
    mlp.submodules.experts = ModuleSpec(module=ExpertGroups, params={"groups": counts}, submodules=grouped.submodules)


def _norm(config: MoELPRConfig, transformer_engine: bool) -> type:
    """The norm of the residual stream. Transformer Engine's layer norm always has a bias."""
    if config.normalization == "LayerNorm":
        return LayerNorm
    if not transformer_engine:
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _as_the_family_computes(spec: ModuleSpec, config: MoELPRConfig, transformer_engine: bool) -> None:
    """Change Megatron's specification of a layer where the family differs from Llama."""
    family, layer, norm = config.family, spec.submodules, _norm(config, transformer_engine)
    if family.qk_norm == "all heads":
        replace(layer.self_attention, module=AllHeadsAttention)
        layer.sharded_state_dict_keys_map |= ALL_HEADS_KEYS
    if family.norms != "before":
        # In Transformer Engine's layers they are parts of the first products.
        replace(layer, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp)
        if transformer_engine:
            _without_fused_norms(layer)
    if family.norms == "shared":
        spec.module, spec.params = ParallelLayer, {"norm": norm}
        replace(layer, self_attn_bda=OutputAlone, mlp_bda=OutputAlone)
    elif family.norms == "after" or config.multipliers.residual != 1.0:
        params = {"config": config, "norm": norm if family.norms == "after" else None}
        branch = ModuleSpec(ResidualBranch, params=params | {"multiplier": config.multipliers.residual})
        replace(layer, self_attn_bda=branch, mlp_bda=branch)
        layer.sharded_state_dict_keys_map |= NORMS_OF_OUTPUTS


def _without_fused_norms(layer: TransformerLayerSubmodules) -> None:
    """Compute the first products of attention and of a dense FFN by layers without a norm."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    product = TESpecProvider().column_parallel_linear()
    replace(layer.self_attention.submodules, linear_qkv=product)
    if layer.mlp.module is MLP:
        replace(layer.mlp.submodules, linear_fc1=product)


def _local_layer(config: TransformerConfig, num_experts: int) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    attention = spec.submodules.self_attention.submodules
    replace(attention, core_attention=LocalAttention)
    if config.qk_layernorm:
        replace(attention, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    replace(spec.submodules, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
    if num_experts == 1:
        return spec
    provider = LocalSpecProvider()
    dense = MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear())
    grouped = MLPSubmodules(linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear)
    return _with_experts(spec, num_experts, dense, grouped)


def _transformer_engine_layer(config: TransformerConfig, num_experts: int) -> ModuleSpec:
    if num_experts == 1:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts, moe_grouped_gemm=True, qk_layernorm=config.qk_layernorm
    )
    provider = TESpecProvider()
    dense = MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear())
    column, row = grouped_linear_layers()
    grouped = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    return _with_experts(spec, num_experts, dense, grouped)


def _with_experts(spec: ModuleSpec, num_experts: int, dense: MLPSubmodules, grouped: MLPSubmodules) -> ModuleSpec:
    submodules = MoELPRSubmodules(
        router=LPRRouter,
        original_expert=ModuleSpec(module=MLP, submodules=dense),
        shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=dense),
        experts=ModuleSpec(module=TEGroupedMLP, submodules=grouped),
    )
    layer = dataclasses.replace(
        spec.submodules,
        mlp=ModuleSpec(module=MoELPRLayer, params={"num_experts": num_experts}, submodules=submodules),
        sharded_state_dict_keys_map={
            key: value
            for key, value in spec.submodules.sharded_state_dict_keys_map.items()
            if key != NORM_OF_DENSE_LAYER
        },
    )
    return ModuleSpec(module=spec.module, submodules=layer)
