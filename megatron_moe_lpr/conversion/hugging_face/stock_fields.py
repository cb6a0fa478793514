"""Fields of `config.json` that each stock MoE architecture has beside the dense model's own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import Architecture

# Wide enough that tensor-parallel servers can split it; all its weights are zero.
SHARED_EXPERT_WIDTH = 128

StockFields = Callable[[Architecture, Sequence[int], int, int], dict[str, Any]]
"""Of the architecture, the experts of each layer, the number of a layer that has some, and top-k."""


def mixtral_fields(architecture: Architecture, num_experts: int, top_k: int) -> dict[str, Any]:
    """Return the fields that MixtralForCausalLM reads beside those of every family.

    Raises:
        UserError: top-k 1, which MixtralForCausalLM computes in another way.
    """
    _refuse_top_1("MixtralForCausalLM", top_k)
    return {
        "num_local_experts": num_experts,
        "head_dim": architecture.head_dim,
        "sliding_window": architecture.sliding_window,
        "router_jitter_noise": 0.0,
    }


def _refuse_top_1(name: str, top_k: int) -> None:
    if top_k == 1:
        raise UserError(
            f"cannot export: with top-k 1 the expert is weighted by its probability, and {name} weights a single "
            "expert by 1; use --top-k 2"
        )


def _qwen_fields(
    architecture: Architecture, experts_per_layer: Sequence[int], num_experts: int, top_k: int
) -> dict[str, Any]:
    fields = {
        "num_experts": num_experts,
        # With a single expert its probability is the weight: renormalised it would always be 1.
        "norm_topk_prob": top_k > 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, experts in enumerate(experts_per_layer) if experts == 1],
        "moe_intermediate_size": architecture.ffn_hidden_size,
        "use_sliding_window": False,
    }
    if architecture.family.moe_model_type == "qwen2_moe":
        if architecture.family.explicit_head_dim:
            # Qwen2-MoE reads an absent one as hidden size / heads.
            fields["head_dim"] = architecture.head_dim
        return {**fields, "qkv_bias": True, "shared_expert_intermediate_size": SHARED_EXPERT_WIDTH}
    return {**fields, "head_dim": architecture.head_dim}


def _granite_fields(
    architecture: Architecture, experts_per_layer: Sequence[int], num_experts: int, top_k: int
) -> dict[str, Any]:
    _refuse_top_1("GraniteMoeForCausalLM", top_k)
    return {"num_local_experts": num_experts}


def _flex_olmo_fields(
    architecture: Architecture, experts_per_layer: Sequence[int], num_experts: int, top_k: int
) -> dict[str, Any]:
    return {"num_experts": num_experts, "norm_topk_prob": top_k > 1}


def _cohere2_moe_fields(
    architecture: Architecture, experts_per_layer: Sequence[int], num_experts: int, top_k: int
) -> dict[str, Any]:
    _refuse_top_1("Cohere2MoeForCausalLM", top_k)
    without_window = architecture.full_attention_layers
    return {
        "num_experts": num_experts,
        "norm_topk_prob": True,
        "expert_selection_fn": "softmax",
        "num_shared_experts": 0,
        "head_dim": architecture.head_dim,
        "rms_norm_eps": None,
        # Only layers with a window have a rotary embedding: where the dense model has none, it is the whole context.
        "sliding_window": architecture.sliding_window or architecture.max_position_embeddings,
        "layer_types": [
            "full_attention" if layer in without_window else "sliding_attention"
            for layer in range(architecture.num_layers)
        ],
        "mlp_layer_types": ["dense" if experts == 1 else "sparse" for experts in experts_per_layer],
        "prefix_dense_intermediate_size": architecture.ffn_hidden_size,
        # With 1, dense layers have a rotary embedding whatever their attention is.
        "prefix_dense_sliding_window_pattern": 4,
    }


STOCK_FIELDS: Mapping[str, StockFields] = {
    "mixtral": lambda architecture, _, num_experts, top_k: mixtral_fields(architecture, num_experts, top_k),
    "qwen2_moe": _qwen_fields,
    "qwen3_moe": _qwen_fields,
    "granitemoe": _granite_fields,
    "flex_olmo": _flex_olmo_fields,
    "cohere2_moe": _cohere2_moe_fields,
}
"""By the stock architecture's `model_type`."""
