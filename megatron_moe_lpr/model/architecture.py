"""What a dense Hugging Face `config.json` says about a model, in one checked dataclass."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_moe_lpr.errors import UserError

HFConfig = Mapping[str, Any]

MISTRAL_SLIDING_WINDOW = 4096
"""What transformers takes where a Mistral configuration names no window; null is no window."""


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


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a dense model, read from its Hugging Face configuration."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    tied_embeddings: bool
    initializer_range: float
    rope: Mapping[str, Any]
    """`rope_type`, `rope_theta` and the type's own parameters, in transformers' names."""
    sliding_window: int | None
    """A token attends to itself and the `sliding_window - 1` tokens before it; None: to all before it."""


def read_architecture(config: HFConfig, source: str = "config.json") -> Architecture:
    """Read a dense configuration; `source` names the file in error messages.

    Raises:
        UserError: an architecture or a switch this project does not support, or a missing field.
    """
    family = _family(config, source)
    _refuse_unsupported(config, family, source)
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Architecture(
            family=family,
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            ffn_hidden_size=int(config["intermediate_size"]),
            num_attention_heads=heads,
            num_query_groups=_num_query_groups(config, family, heads),
            head_dim=int(config.get("head_dim") or family.explicit_head_dim or hidden // heads),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config["max_position_embeddings"]),
            norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            initializer_range=float(config.get("initializer_range", 0.02)),
            rope=_rope(config, source),
            sliding_window=_sliding_window(config, family, source),
        )
    except KeyError as error:
        raise UserError(f"{source}: the field {error} is missing") from None


def _family(config: HFConfig, source: str) -> Family:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        supported = ", ".join(f"{family.architecture} ({name})" for name, family in FAMILIES.items())
        raise UserError(f"{source}: architecture {model_type!r} is not supported; supported are {supported}")
    return FAMILIES[model_type]


def _refuse_unsupported(config: HFConfig, family: Family, source: str) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{source}: hidden_act={config['hidden_act']!r} is not supported, only 'silu'")
    if family.name != "qwen2" and config.get("mlp_bias"):
        raise UserError(f"{source}: mlp_bias=true is not supported for {family.architecture}")
    if config.get("quantization_config"):
        raise UserError(f"{source}: quantised weights are not supported; convert from the bf16 checkpoint")


def _rope(config: HFConfig, source: str) -> Mapping[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4), as one mapping."""
    rope = dict(config.get("rope_scaling") or {})
    rope.update(config.get("rope_parameters") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        raise UserError(
            f"{source}: rope_type {rope['rope_type']!r} is not supported; default, linear, llama3 and yarn are"
        )
    if rope["rope_type"] == "yarn":
        _check_yarn(rope, source)
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{source}: partial_rotary_factor other than 1 is not supported")
    return rope


def _check_yarn(rope: Mapping[str, Any], source: str) -> None:
    """Qwen's form: the factor and the original context, and perhaps betas and the attention factor."""
    for name in ("factor", "original_max_position_embeddings"):
        if not rope.get(name):
            raise UserError(f"{source}: rope_type 'yarn' without {name}")
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"}
    unknown = {name for name, value in rope.items() if value is not None} - known - {"beta_fast", "beta_slow"}
    if unknown - {"type"}:
        raise UserError(f"{source}: rope_type 'yarn' with {', '.join(sorted(unknown))} is not supported")


def _num_query_groups(config: HFConfig, family: Family, heads: int) -> int:
    """Absent means one group per head for Llama alone; the other families' defaults are numbers of their own."""
    groups = config.get("num_key_value_heads")
    if groups is None and family.name != "llama":
        raise KeyError("num_key_value_heads")
    return int(groups or heads)


def _sliding_window(config: HFConfig, family: Family, source: str) -> int | None:
    """The one window of all layers; a window in some of them only is refused."""
    if family.name == "mistral":
        window = config.get("sliding_window", MISTRAL_SLIDING_WINDOW)
    else:
        layers = int(config["num_hidden_layers"])
        # transformers gives a window to the layers from max_window_layers on.
        if config.get("use_sliding_window") and int(config.get("max_window_layers", 28)) < layers:
            raise UserError(f"{source}: use_sliding_window=true (a window in some layers only) is not supported")
        window = None
    kinds = set(config.get("layer_types") or ())
    if kinds - {"sliding_attention" if window else "full_attention"}:
        raise UserError(
            f"{source}: layer_types holds {' and '.join(sorted(map(str, kinds)))}; all layers must be alike, and "
            + (f"this model's window is {window} in all of them" if window else "without a window here")
        )
    return window
