"""`config.json` of the stock MoE architecture from the dense model's, and back.

Fields stay as the source had them wherever both architectures read them alike. Written out are the fields whose default
differs between the two architectures, and the rotary embedding in the spellings of transformers 4 and 5.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_moe_lpr.checkpoint.format.card import MAX_EXPERTS, check_experts
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import checked_integer, integer, is_integer, shown
from megatron_moe_lpr.model.configuration.architecture import FAMILIES, MAX_LAYERS, MAX_SIZE, Architecture
from megatron_moe_lpr.model.configuration.rope_parameters import DEFAULT_THETA, read_rope
from megatron_moe_lpr.program import command

# Wide enough that tensor-parallel servers can split it; all its weights are zero.
SHARED_EXPERT_WIDTH = 128
DENSE_FAMILY_OF_MOE = {"mixtral": "mistral", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3"}
EXPERT_COUNTS = ("num_local_experts", "num_experts")
MOE_FIELDS = (
    *EXPERT_COUNTS,
    "num_experts_per_tok",
    "norm_topk_prob",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
# They have a reader run code that comes with the model; an export carries none.
CODE_FIELDS = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")
# True of the base model's files alone; `_name_or_path` is often the parent that it was fine-tuned from.
BASE_FIELDS = (
    "quantization_config",
    "quantization",
    "_name_or_path",
    "_commit_hash",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
)
# What an absent field means in the MoE architecture, where the dense one means something else by its absence.
MOE_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_key_value_heads": 16, "num_experts_per_tok": 4},
    "qwen3_moe": {"num_key_value_heads": 4, "num_experts_per_tok": 8},
}


def moe_config(
    dense: Mapping[str, Any], architecture: Architecture, experts_per_layer: Sequence[int], top_k: int
) -> dict[str, Any]:
    """The stock MoE architecture's configuration.

    Raises:
        UserError: the stock architecture cannot hold this model; the message says why.
    """
    num_experts = _common_number_of_experts(experts_per_layer, architecture)
    family = architecture.family
    config = without_foreign_fields(dense)
    config |= {"model_type": family.moe_model_type, "architectures": [family.moe_architecture]}
    config.update(
        rms_norm_eps=architecture.norm_epsilon,
        num_key_value_heads=architecture.num_query_groups,
        num_experts_per_tok=top_k,
        output_router_logits=False,
        router_aux_loss_coef=0.001,
    )
    config = with_both_rope_spellings(config, architecture)
    if "head_dim" in config:
        config["head_dim"] = architecture.head_dim  # transformers reads null as none at all
    if config.get("attention_bias"):
        config["attention_bias"] = False  # Zero, or the import would have refused them.
    if family.moe_model_type == "mixtral":
        return {**config, **mixtral_fields(architecture, num_experts, top_k)}
    return {**config, **_qwen_fields(architecture, experts_per_layer, num_experts, top_k)}


def without_foreign_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without references to code and without what is true of the base model's directory alone."""
    return {name: value for name, value in config.items() if name not in (*CODE_FIELDS, *BASE_FIELDS)}


def without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration but for the dtype of the weights, which training may change."""
    return {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}


def with_both_rope_spellings(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The configuration with `rope_theta` and `rope_scaling`, which transformers 4 reads, beside `rope_parameters`.

    A reader that does not know `rope_parameters` takes its own defaults without a word. All of them say what
    `architecture.rope` does, whichever of them that was read from.
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
        raise UserError(
            f"cannot export: layers have different numbers of experts ({', '.join(map(str, counts))}), and "
            f"{architecture.family.moe_architecture} holds one number for all of them; where a stock export is wanted, "
            f"allocate with {command('allocate')} --uniform-count, which gives each layer the same number or none"
        )
    return counts[0]


def mixtral_fields(architecture: Architecture, num_experts: int, top_k: int) -> dict[str, Any]:
    """What MixtralForCausalLM reads beside the fields of every family.

    Raises:
        UserError: top-k 1, which it cannot hold.
    """
    if top_k == 1:
        raise UserError(
            "cannot export: with top-k 1 the expert is weighted by its probability, and MixtralForCausalLM weights a "
            "single expert by 1; use --top-k 2"
        )
    return {
        "num_local_experts": num_experts,
        "head_dim": architecture.head_dim,
        "sliding_window": architecture.sliding_window,
        "router_jitter_noise": 0.0,
    }


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


def dense_config(moe: Mapping[str, Any], source: str, family_name: str | None = None) -> dict[str, Any]:
    """The dense configuration behind a stock MoE one that this project's export, or a like-minded tool, has written.

    Args:
        source: names the file in messages.
        family_name: the dense family, where it is known; a Mixtral may be a Llama.

    Raises:
        UserError: the configuration holds something that the upcycled model cannot be.
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
        # Mistral reads an absent window as 4096, Mixtral as none.
        dense["sliding_window"] = moe.get("sliding_window")
        if family.name == "llama" and dense["sliding_window"] is not None:
            raise UserError(
                f"{source}: sliding_window {shown(dense['sliding_window'])}, but the model was a Llama, which has "
                "none; set it to null, or remove moe_lpr/ to read the MoE as a Mistral"
            )
    else:
        dense["intermediate_size"] = _qwen_intermediate_size(moe, source)
    if model_type == "qwen3_moe" and not moe.get("head_dim"):
        # Qwen3 reads an absent head_dim as 128.
        heads = integer(moe, "num_attention_heads", source, 1, MAX_SIZE)
        dense["head_dim"] = integer(moe, "hidden_size", source, 1, MAX_SIZE) // heads
    return dense


def _refuse_foreign_moe(moe: Mapping[str, Any], model_type: str, source: str) -> None:
    if model_type == "mixtral":
        if top_k_of(moe, source) == 1:
            raise UserError(f"{source}: a Mixtral with one expert per token weights it by 1, not by its probability")
        return
    if moe.get("use_sliding_window"):
        raise UserError(
            f"{source}: use_sliding_window=true is not supported for {model_type}; a window is in some layers"
        )
    if moe.get("decoder_sparse_step", 1) != 1:
        raise UserError(f"{source}: decoder_sparse_step other than 1 is not supported; list mlp_only_layers instead")
    if top_k_of(moe, source) > 1 and not moe.get("norm_topk_prob", False):
        raise UserError(
            f"{source}: norm_topk_prob=false is not MoE-LPR's routing (weights must add up to 1); give a dense model"
        )
    if top_k_of(moe, source) == 1 and moe.get("norm_topk_prob", False):
        raise UserError(f"{source}: norm_topk_prob=true with one expert per token weights it by 1, not its probability")
    if model_type == "qwen2_moe" and not moe.get("qkv_bias", True):
        raise UserError(f"{source}: qkv_bias=false is not supported for qwen2_moe")


def _qwen_intermediate_size(moe: Mapping[str, Any], source: str) -> int:
    expert, dense = integer(moe, "moe_intermediate_size", source, 1, MAX_SIZE), moe.get("intermediate_size")
    if moe.get("mlp_only_layers") and dense != expert:
        raise UserError(
            f"{source}: experts ({expert}) and dense layers ({shown(dense)}) must have the same intermediate size"
        )
    return expert


def top_k_of(moe: Mapping[str, Any], source: str) -> int:
    """Experts per token of a stock MoE configuration.

    Raises:
        UserError: no such number.
    """
    given = moe.get("num_experts_per_tok")
    value = MOE_DEFAULTS[moe["model_type"]]["num_experts_per_tok"] if given is None else given
    return checked_integer(value, "num_experts_per_tok", source, 1, MAX_EXPERTS)


def experts_per_layer_of(moe: Mapping[str, Any], source: str) -> list[int]:
    """Number of experts of each layer of a stock MoE configuration; 1 for a dense layer.

    Raises:
        UserError: a field is missing, or is no such number or list.
    """
    given = {name: moe[name] for name in EXPERT_COUNTS if moe.get(name) is not None}
    if len(set(map(shown, given.values()))) > 1:
        raise UserError(
            f"{source}: num_local_experts is {shown(given[EXPERT_COUNTS[0]])} and num_experts is "
            f"{shown(given[EXPERT_COUNTS[1]])}, and versions of transformers differ in which of them they read; remove "
            "the wrong one"
        )
    name = next(iter(given), "num_experts")
    experts = integer(moe, name, source, 1, MAX_EXPERTS)
    layers = integer(moe, "num_hidden_layers", source, 1, MAX_LAYERS)
    dense = moe.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(is_integer(layer, 0, layers - 1) for layer in dense):
        raise UserError(f"{source}: mlp_only_layers must be a list of layers from 0 to {layers - 1}")
    chosen = set(dense)
    counts = [1 if layer in chosen else experts for layer in range(layers)]
    check_experts(counts, f"{source}: {name}")
    return counts
