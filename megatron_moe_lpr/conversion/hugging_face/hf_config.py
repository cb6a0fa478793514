"""Convert config.json of a dense model to config.json of the stock MoE architecture, and the inverse.

Fields that both architectures read alike are copied. Fields whose defaults differ are written explicitly, and the
rotary embedding in the spellings of transformers 4 and 5.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_moe_lpr.checkpoint.format.card import MAX_EXPERTS, check_experts
from megatron_moe_lpr.conversion.hugging_face.stock_fields import STOCK_FIELDS
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import abbreviated, checked_integer, required_int
from megatron_moe_lpr.model.configuration.architecture import MAX_POSITIONS, MAX_SIZE, Architecture, layer_kinds
from megatron_moe_lpr.model.configuration.families import FAMILIES
from megatron_moe_lpr.model.configuration.mixtures import EXPERT_FIELDS, USUAL_FIELDS, expert_fields, experts_by_layer
from megatron_moe_lpr.model.configuration.rope_parameters import DEFAULT_THETA, read_rope
from megatron_moe_lpr.program import command

DENSE_FAMILY_OF_MOE = {
    "mixtral": "mistral",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen3",
    "granitemoe": "granite",
    "flex_olmo": "olmo2",
    "cohere2_moe": "cohere2",
}
"""The family as which a stock MoE is read that names none: several may become the same stock architecture."""
MOE_NAMES = {"mixtral": "Mixtral", "granitemoe": "GraniteMoE", "cohere2_moe": "Cohere2-MoE"}
WEIGHTS_OF_ONE = frozenset(MOE_NAMES)
"""Stock architectures that weight a single expert by 1: the softmax runs over the chosen ones."""
MOE_FIELDS = (
    *(name for fields in (USUAL_FIELDS, *EXPERT_FIELDS.values()) for name in (*fields.counts, fields.top_k)),
    "norm_topk_prob",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "expert_selection_fn",
    "num_shared_experts",
    "shared_expert_combination_strategy",
    "mlp_layer_types",
    "prefix_dense_intermediate_size",
    "prefix_dense_sliding_window_pattern",
    "first_k_dense_replace",
)
# Fields that make a reader run code of the model; an export has no code.
CODE_FIELDS = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")
# Fields that are true only of the base model's files; `_name_or_path` is often the model it was fine-tuned from.
BASE_FIELDS = (
    "quantization_config",
    "quantization",
    "_name_or_path",
    "_commit_hash",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
)
# Defaults of the MoE architecture that differ from those of the dense architecture.
MOE_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_key_value_heads": 16, "num_experts_per_tok": 4},
    "qwen3_moe": {"num_key_value_heads": 4, "num_experts_per_tok": 8},
    "granitemoe": {"num_experts_per_tok": 2},
    "flex_olmo": {"rms_norm_eps": 1e-6, "rope_theta": 5e5, "num_experts_per_tok": 5},
    "cohere2_moe": {"num_experts_per_tok": 2},
}


def moe_config(
    dense: Mapping[str, Any], architecture: Architecture, experts_per_layer: Sequence[int], top_k: int
) -> dict[str, Any]:
    """Return the configuration of the stock MoE architecture; of a mixture base its own with more experts.

    Raises:
        UserError: the stock architecture cannot hold this model; the message says why.
    """
    num_experts = _common_number_of_experts(experts_per_layer, architecture)
    family = architecture.family
    config = without_foreign_fields(dense)
    if architecture.mixture:
        # transformers 5 saves a Qwen3-MoE's number as num_local_experts, and transformers 4 reads num_experts alone.
        config = {**config, expert_fields(config).counts[-1]: num_experts}
        return with_expert_count(with_both_rope_spellings(config, architecture), num_experts)
    config |= {"model_type": family.moe_model_type, "architectures": [family.moe_architecture]}
    config[family.norm_epsilon[0]] = architecture.norm_epsilon
    if family.tied:
        config["tie_word_embeddings"] = architecture.tied_embeddings
    config.update(
        num_key_value_heads=architecture.num_query_groups,
        output_router_logits=False,
        router_aux_loss_coef=0.001,
    )
    config[expert_fields(config).top_k] = top_k
    config = with_both_rope_spellings(config, architecture)
    if "head_dim" in config:
        config["head_dim"] = architecture.head_dim  # transformers reads null as none at all
    if config.get("attention_bias"):
        config["attention_bias"] = False  # Zero, or the import would have refused them.
    if family.qkv_bias:
        config.pop("attention_bias", None)  # The stock architecture has these biases without a field for them.
    return {**config, **STOCK_FIELDS[family.moe_model_type](architecture, experts_per_layer, num_experts, top_k)}


def with_expert_count(moe: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
    """Return a stock MoE configuration with another number of experts, in every field that names it."""
    named = [name for name in expert_fields(moe).counts if moe.get(name) is not None]
    return {**moe, **dict.fromkeys(named, num_experts)}


def without_foreign_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without references to code and without `BASE_FIELDS`."""
    return {name: value for name, value in config.items() if name not in (*CODE_FIELDS, *BASE_FIELDS)}


def without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without the dtype of the weights, which training may change."""
    return {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}


def with_both_rope_spellings(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return the configuration with `architecture.rope` in `rope_parameters`, `rope_theta` and `rope_scaling`.

    Transformers 4 reads the latter two, and ignores `rope_parameters` without an error.
    """
    rope = architecture.rope
    config = {**config, "rope_theta": rope["rope_theta"]}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    if "rope_parameters" in config:
        config["rope_parameters"] = dict(rope)
    if "rope_parameters" in config or "rope_scaling" in config:
        config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    return config


def _common_number_of_experts(experts_per_layer: Sequence[int], architecture: Architecture) -> int:
    counts = sorted({experts for experts in experts_per_layer if experts > 1})
    if len(counts) != 1:
        equal = f"allocate with {command('allocate')} --uniform-count, which gives each layer the same number or none"
        if architecture.mixture:
            equal = "add the same number to every layer that has experts, as --add-experts N does"
        raise UserError(
            f"cannot export: layers have different numbers of experts ({', '.join(map(str, counts))}), and "
            f"{architecture.family.moe_architecture} holds one number for all of them; where a stock export is wanted, "
            f"{equal}"
        )
    return counts[0]


def dense_config(moe: Mapping[str, Any], source: str, family_name: str | None = None) -> dict[str, Any]:
    """Return the configuration of the dense model that a stock MoE model was upcycled from.

    Args:
        source: file name for messages.
        family_name: name of the dense family, if known; a Mixtral may have been a Llama.

    Raises:
        UserError: the configuration is not that of an upcycled model.
    """
    model_type = moe["model_type"]
    family = FAMILIES[family_name or DENSE_FAMILY_OF_MOE[model_type]]
    _refuse_foreign_moe(moe, model_type, source)
    config = {**MOE_DEFAULTS[model_type], **moe}
    dense = {name: value for name, value in config.items() if name not in MOE_FIELDS}
    dense.update(model_type=family.name, architectures=[family.architecture])
    # Mixtral's default of rope_theta is its own, also where rope_parameters names none.
    rope = read_rope(moe, source, MOE_DEFAULTS[model_type].get("rope_theta", DEFAULT_THETA))
    for name in ("rope_theta", "rope_scaling"):
        dense.pop(name, None)
    dense["rope_parameters"] = rope
    if model_type == "mixtral":
        dense.setdefault("tie_word_embeddings", False)
        # Mistral reads an absent window as 4096, Mixtral as none.
        dense["sliding_window"] = moe.get("sliding_window")
        if family.window == "none" and dense["sliding_window"] is not None:
            raise UserError(
                f"{source}: sliding_window {abbreviated(dense['sliding_window'])}, but the model was a Llama, which "
                "has none; set it to null, or remove moe_lpr/ to read the MoE as a Mistral"
            )
    elif model_type in ("qwen2_moe", "qwen3_moe"):
        dense["intermediate_size"] = _qwen_intermediate_size(moe, source)
    if model_type == "qwen3_moe" and not moe.get("head_dim"):
        # Qwen3 reads an absent head_dim as 128.
        heads = required_int(moe, "num_attention_heads", source, 1, MAX_SIZE)
        dense["head_dim"] = required_int(moe, "hidden_size", source, 1, MAX_SIZE) // heads
    if model_type == "cohere2_moe":
        dense.pop("rms_norm_eps", None)
        dense["layer_types"] = layer_kinds(moe, source)
        if family.window == "none":
            # The window over the whole context that `stock_fields.py` writes.
            _check_whole_context(moe, source)
            for name in ("sliding_window", "layer_types", "sliding_window_pattern"):
                dense.pop(name, None)
    return dense


def _check_whole_context(moe: Mapping[str, Any], source: str) -> None:
    window = required_int(moe, "sliding_window", source, 1, MAX_POSITIONS)
    if window < required_int(moe, "max_position_embeddings", source, 1, MAX_POSITIONS):
        raise UserError(
            f"{source}: sliding_window {window}, but the model was a Cohere, whose layers see the whole context; set "
            "it to max_position_embeddings"
        )


def _refuse_foreign_moe(moe: Mapping[str, Any], model_type: str, source: str) -> None:
    """Refuse a stock mixture that routes or computes otherwise than an upcycled model."""
    if model_type == "cohere2_moe":
        _refuse_foreign_cohere(moe, source)
    if model_type in WEIGHTS_OF_ONE:
        if stock_top_k(moe, source) == 1:
            name = MOE_NAMES[model_type]
            raise UserError(f"{source}: a {name} with one expert per token weights it by 1, not by its probability")
        return
    if moe.get("use_sliding_window"):
        raise UserError(
            f"{source}: use_sliding_window=true is not supported for {model_type}; a window is in some layers"
        )
    if moe.get("decoder_sparse_step", 1) != 1:
        raise UserError(f"{source}: decoder_sparse_step other than 1 is not supported; list mlp_only_layers instead")
    if stock_top_k(moe, source) > 1 and not moe.get("norm_topk_prob", False):
        raise UserError(
            f"{source}: norm_topk_prob=false is not MoE-LPR's routing (weights must add up to 1); give a dense model"
        )
    if stock_top_k(moe, source) == 1 and moe.get("norm_topk_prob", False):
        raise UserError(f"{source}: norm_topk_prob=true with one expert per token weights it by 1, not its probability")
    if model_type == "qwen2_moe" and not moe.get("qkv_bias", True):
        raise UserError(f"{source}: qkv_bias=false is not supported for qwen2_moe")


def _refuse_foreign_cohere(moe: Mapping[str, Any], source: str) -> None:
    """Refuse fields of a Cohere2-MoE that no upcycled model has."""
    only = {
        "expert_selection_fn": "softmax",
        "num_shared_experts": 0,
        "first_k_dense_replace": 0,
        "rms_norm_eps": None,
    }
    for name, value in only.items():
        if moe.get(name, value) != value:
            raise UserError(f"{source}: {name}={abbreviated(moe[name])} is not supported for cohere2_moe")
    if "dense" in (moe.get("mlp_layer_types") or ()) and moe.get("prefix_dense_sliding_window_pattern", 1) == 1:
        raise UserError(
            f"{source}: prefix_dense_sliding_window_pattern=1 is not supported beside dense layers: they would have a "
            "rotary embedding whatever their attention is"
        )


def _qwen_intermediate_size(moe: Mapping[str, Any], source: str) -> int:
    expert, dense = required_int(moe, "moe_intermediate_size", source, 1, MAX_SIZE), moe.get("intermediate_size")
    if moe.get("mlp_only_layers") and dense != expert:
        raise UserError(
            f"{source}: experts ({expert}) and dense layers ({abbreviated(dense)}) must have the same intermediate size"
        )
    return expert


def stock_top_k(moe: Mapping[str, Any], source: str) -> int:
    """Return the number of experts per token of a stock MoE configuration.

    Raises:
        UserError: the field is not such a number.
    """
    name = expert_fields(moe).top_k
    given = moe.get(name)
    value = MOE_DEFAULTS[moe["model_type"]][name] if given is None else given
    return checked_integer(value, name, source, 1, MAX_EXPERTS)


def stock_experts_per_layer(moe: Mapping[str, Any], source: str) -> list[int]:
    """Return the number of experts of each layer of a stock MoE configuration; 1 for a dense layer.

    Raises:
        UserError: a field is missing, or not such a number or list.
    """
    counts = experts_by_layer(moe, source)
    check_experts(counts, f"{source}: number of experts")
    return counts
