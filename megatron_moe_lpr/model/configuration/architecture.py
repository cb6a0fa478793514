"""A dense model's Hugging Face `config.json`, checked, as one dataclass."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import abbreviated, checked_integer, optional_bool, optional_float, required_int
from megatron_moe_lpr.model.configuration.mixtures import (
    DEFAULTS,
    MAX_LAYERS,
    MAX_SIZE,
    Mixture,
    read_mixture,
    with_mixture_defaults,
)
from megatron_moe_lpr.model.configuration.quantisation import refuse_quantisation
from megatron_moe_lpr.model.configuration.rope_parameters import DEFAULT_THETA, read_rope

HFConfig = Mapping[str, Any]

# Far above any model, and low enough that a hostile configuration allocates little before any tensor is checked.
MAX_POSITIONS = 1 << 40
MAX_VOCABULARY = (1 << 31) - 1

MISTRAL_SLIDING_WINDOW = 4096
"""transformers' default where a Mistral configuration has no `sliding_window`; null means no window."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One line of the table of supported dense architectures."""

    name: str
    """The `model_type` of the dense checkpoint."""
    architecture: str
    """The transformers class of the dense checkpoint."""
    moe_model_type: str
    """The `model_type` of the stock architecture that holds the upcycled model."""
    moe_architecture: str
    """The transformers class of the upcycled model."""
    qkv_bias: bool
    """Query, key and value projections have a bias."""
    qk_norm: bool
    """Queries and keys are normalised per head."""
    explicit_head_dim: int | None = None
    """The head dimension where the configuration names none; None: hidden size / heads."""


FAMILIES = {
    family.name: family
    for family in (
        Family("qwen2", "Qwen2ForCausalLM", "qwen2_moe", "Qwen2MoeForCausalLM", qkv_bias=True, qk_norm=False),
        Family(
            "qwen3", "Qwen3ForCausalLM", "qwen3_moe", "Qwen3MoeForCausalLM", False, qk_norm=True, explicit_head_dim=128
        ),
        Family("llama", "LlamaForCausalLM", "mixtral", "MixtralForCausalLM", qkv_bias=False, qk_norm=False),
        Family("mistral", "MistralForCausalLM", "mixtral", "MixtralForCausalLM", qkv_bias=False, qk_norm=False),
    )
}
MIXTURES = {
    family.name: family
    for family in (
        Family("mixtral", "MixtralForCausalLM", "mixtral", "MixtralForCausalLM", qkv_bias=False, qk_norm=False),
        Family("qwen2_moe", "Qwen2MoeForCausalLM", "qwen2_moe", "Qwen2MoeForCausalLM", qkv_bias=True, qk_norm=False),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", "qwen3_moe", "Qwen3MoeForCausalLM", qkv_bias=False, qk_norm=True),
    )
}
"""Families of base models that are mixtures: the model with more experts is of the same architecture."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a base model, read from its Hugging Face configuration."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the FFN, in a mixture that of an expert."""
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    tied_embeddings: bool
    rope: Mapping[str, Any]
    """`rope_type`, `rope_theta` and the type's own parameters, in transformers' names."""
    sliding_window: int | None
    """A token attends to itself and the `sliding_window - 1` tokens before it; None: to all before it."""
    mixture: Mixture | None = None
    """Experts of a base model that is a mixture itself; None: a dense model."""

    def base_experts(self, layer: int) -> int:
        """Original experts of a layer: all that a mixture base has, or 1, the dense model's FFN."""
        return self.mixture.experts[layer] if self.mixture else 1


def read_architecture(config: HFConfig, source: str = "config.json") -> Architecture:
    """Read the configuration of a dense model or of a mixture base; `source` names the file in error messages.

    Raises:
        UserError: an architecture or a switch this project does not support, or a missing field.
    """
    family = _family(config, source)
    is_mixture = family.name in MIXTURES
    if is_mixture:
        config = with_mixture_defaults(config, source)
    _refuse_unsupported(config, family, source)
    hidden = required_int(config, "hidden_size", source, 1, MAX_SIZE)
    heads = required_int(config, "num_attention_heads", source, 1, MAX_SIZE)
    return Architecture(
        family=family,
        num_layers=required_int(config, "num_hidden_layers", source, 1, MAX_LAYERS),
        hidden_size=hidden,
        ffn_hidden_size=required_int(config, "intermediate_size", source, 1, MAX_SIZE),
        num_attention_heads=heads,
        num_query_groups=_num_query_groups(config, family, heads, source),
        head_dim=_head_dim(config, family, hidden, heads, source),
        vocab_size=required_int(config, "vocab_size", source, 1, MAX_VOCABULARY),
        max_position_embeddings=required_int(config, "max_position_embeddings", source, 1, MAX_POSITIONS),
        norm_epsilon=optional_float(config, "rms_norm_eps", 1e-6, source, 0.0, 1.0),
        tied_embeddings=optional_bool(config, "tie_word_embeddings", source),
        rope=read_rope(config, source, DEFAULTS.get(family.name, {}).get("rope_theta", DEFAULT_THETA)),
        sliding_window=_sliding_window(config, family, source),
        mixture=read_mixture(config, source) if is_mixture else None,
    )


def _family(config: HFConfig, source: str) -> Family:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in MIXTURES:
        return MIXTURES[model_type]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = ", ".join(f"{family.architecture} ({name})" for name, family in FAMILIES.items())
        raise UserError(f"{source}: architecture {abbreviated(model_type)} is not supported; supported are {supported}")
    return FAMILIES[model_type]


def _refuse_unsupported(config: HFConfig, family: Family, source: str) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{source}: hidden_act={abbreviated(config['hidden_act'])} is not supported, only 'silu'")
    if family.name != "qwen2" and config.get("mlp_bias"):
        raise UserError(f"{source}: mlp_bias=true is not supported for {family.architecture}")
    if config.get("is_causal", True) is not True:
        raise UserError(
            f"{source}: is_causal={abbreviated(config['is_causal'])} is not supported: attention is causal here"
        )
    if config.get("per_layer_config"):
        raise UserError(f"{source}: per_layer_config is not supported: all layers must be alike")
    refuse_quantisation(config, source)


def _num_query_groups(config: HFConfig, family: Family, heads: int, source: str) -> int:
    """Null means one group per head; so does an absent field for Llama. The other families' defaults vary: required."""
    groups = config.get("num_key_value_heads")
    if "num_key_value_heads" not in config and family.name != "llama":
        raise UserError(f"{source}: the field 'num_key_value_heads' is missing")
    groups = heads if groups is None else checked_integer(groups, "num_key_value_heads", source, 1, heads)
    if heads % groups:
        raise UserError(f"{source}: num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    return groups


def _head_dim(config: HFConfig, family: Family, hidden: int, heads: int, source: str) -> int:
    given = config.get("head_dim")
    size = (family.explicit_head_dim or hidden // heads) if given is None else given
    checked_integer(size, "head_dim", source, 2, MAX_SIZE)
    if size % 2:
        raise UserError(f"{source}: head_dim {size} must be even, for rotary position embedding")
    return size


def _sliding_window(config: HFConfig, family: Family, source: str) -> int | None:
    """The window that all layers share; None: full attention. A window in some layers only is refused."""
    if family.name in ("mistral", "mixtral"):
        window = config.get("sliding_window", MISTRAL_SLIDING_WINDOW if family.name == "mistral" else None)
        window = None if window is None else checked_integer(window, "sliding_window", source, 1, MAX_POSITIONS)
    else:
        # transformers gives a window to the layers from max_window_layers on.
        layers, first = config["num_hidden_layers"], config.get("max_window_layers", 28)
        checked_integer(first, "max_window_layers", source, 0, MAX_POSITIONS)
        if config.get("use_sliding_window") and first < layers:
            raise UserError(f"{source}: use_sliding_window=true (a window in some layers only) is not supported")
        window = None
    _check_layer_types(config, window, source)
    return window


def _check_layer_types(config: HFConfig, window: int | None, source: str) -> None:
    kinds = config.get("layer_types") or ()
    if not isinstance(kinds, list | tuple):
        raise UserError(f"{source}: layer_types must be a list, not {abbreviated(kinds)}")
    if kinds and len(kinds) != config["num_hidden_layers"]:
        raise UserError(
            f"{source}: layer_types names {len(kinds)} layers, and num_hidden_layers is {config['num_hidden_layers']}"
        )
    unlike = {str(kind) for kind in kinds} - {"sliding_attention" if window else "full_attention"}
    if unlike:
        raise UserError(
            f"{source}: layer_types holds {' and '.join(sorted({str(kind) for kind in kinds}))}; all layers must be "
            "alike, and " + (f"this model's window is {window} in all of them" if window else "without a window here")
        )
