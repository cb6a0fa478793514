"""A dense model's Hugging Face `config.json`, checked, as one dataclass."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import abbreviated, checked_integer, optional_bool, optional_float, required_int
from megatron_moe_lpr.model.configuration.families import (
    FAMILIES,
    MIXTURES,
    NO_MULTIPLIERS,
    REFUSED,
    Family,
    Multipliers,
)
from megatron_moe_lpr.model.configuration.mixtures import (
    MAX_LAYERS,
    MAX_SIZE,
    Mixture,
    read_mixture,
    with_mixture_defaults,
)
from megatron_moe_lpr.model.configuration.quantisation import refuse_quantisation
from megatron_moe_lpr.model.configuration.rope_parameters import read_rope

HFConfig = Mapping[str, Any]

# Far above any model, and low enough that a hostile configuration allocates little before any tensor is checked.
MAX_POSITIONS = 1 << 40
MAX_VOCABULARY = (1 << 31) - 1


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
    full_attention_layers: tuple[int, ...] = ()
    """Layers without the window that the others have, and without rotary embedding."""
    multipliers: Multipliers = NO_MULTIPLIERS
    mixture: Mixture | None = None
    """Experts of a base model that is a mixture itself; None: a dense model."""

    def window(self, layer: int) -> int | None:
        """Return the sliding window of a layer; None: a token attends to all before it."""
        return None if layer in self.full_attention_layers else self.sliding_window

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
    window, full_attention_layers = _windows(config, family, source)
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
        norm_epsilon=optional_float(config, *family.norm_epsilon, source, 0.0, 1.0),
        tied_embeddings=optional_bool(config, "tie_word_embeddings", source, family.tied),
        rope=_rope(config, family, source),
        sliding_window=window,
        full_attention_layers=full_attention_layers,
        multipliers=_multipliers(config, family, source),
        mixture=read_mixture(config, source) if is_mixture else None,
    )


def _family(config: HFConfig, source: str) -> Family:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in REFUSED:
        raise UserError(f"{source}: architecture {model_type!r} is not supported: {REFUSED[model_type]}")
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
    for name, value in family.fixed:
        # None is what transformers takes for absent.
        if config.get(name) not in (None, value):
            raise UserError(
                f"{source}: {name}={abbreviated(config[name])} is not supported for {family.architecture}, only "
                f"{abbreviated(value)}"
            )
    if config.get("is_causal", True) is not True:
        raise UserError(
            f"{source}: is_causal={abbreviated(config['is_causal'])} is not supported: attention is causal here"
        )
    if config.get("per_layer_config"):
        raise UserError(f"{source}: per_layer_config is not supported: all layers must be alike")
    refuse_quantisation(config, source)


def _num_query_groups(config: HFConfig, family: Family, heads: int, source: str) -> int:
    """Null means one group per head; so does an absent field in some families. The others' defaults vary: required."""
    groups = config.get("num_key_value_heads")
    if "num_key_value_heads" not in config and not family.groups_may_be_absent:
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


def _rope(config: HFConfig, family: Family, source: str) -> dict[str, Any]:
    rope = read_rope(config, source, family.rope_theta)
    if family.rope_types and rope["rope_type"] not in family.rope_types:
        raise UserError(f"{source}: rope_type {rope['rope_type']!r} is not supported for {family.architecture}")
    return rope


def _multipliers(config: HFConfig, family: Family, source: str) -> Multipliers:
    values = {
        part: optional_float(config, field, default, source, 1e-30, 1e30) for part, field, default in family.multipliers
    }
    return Multipliers(**values)


def _windows(config: HFConfig, family: Family, source: str) -> tuple[int | None, tuple[int, ...]]:
    """The window and the layers without it; None: full attention in all. Other mixtures of the two are refused."""
    if family.window == "some layers":
        return _window_of_some_layers(config, family, source)
    window = None
    if family.window == "all layers":
        window = config.get("sliding_window", family.default_window)
        window = None if window is None else checked_integer(window, "sliding_window", source, 1, MAX_POSITIONS)
    else:
        # transformers gives a window to the layers from max_window_layers on.
        layers, first = config["num_hidden_layers"], config.get("max_window_layers", 28)
        checked_integer(first, "max_window_layers", source, 0, MAX_POSITIONS)
        if config.get("use_sliding_window") and first < layers:
            raise UserError(f"{source}: use_sliding_window=true (a window in some layers only) is not supported")
    _check_layer_types(config, window, source)
    return window, ()


def _window_of_some_layers(config: HFConfig, family: Family, source: str) -> tuple[int, tuple[int, ...]]:
    """The window and the layers without it, by `layer_types` or, without it, each `sliding_window_pattern`-th one."""
    window = config.get("sliding_window", family.default_window)
    window = checked_integer(window, "sliding_window", source, 1, MAX_POSITIONS)
    kinds = layer_kinds(config, source)
    if any(kind not in ("sliding_attention", "full_attention") for kind in kinds):
        raise UserError(f"{source}: layer_types must name sliding_attention and full_attention alone")
    return window, tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")


def layer_kinds(config: HFConfig, source: str) -> list[str]:
    """Return the kind of attention of each layer of a model with a window in some layers, in transformers' words.

    Raises:
        UserError: fields that do not fit the number of layers.
    """
    layers = required_int(config, "num_hidden_layers", source, 1, MAX_LAYERS)
    kinds = config.get("layer_types")
    if kinds is None:
        pattern = checked_integer(
            config.get("sliding_window_pattern", 4), "sliding_window_pattern", source, 1, MAX_SIZE
        )
        return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    _check_number_of_kinds(kinds, layers, source)
    return list(kinds)


def _check_number_of_kinds(kinds: Any, layers: int, source: str) -> None:
    if not isinstance(kinds, list | tuple):
        raise UserError(f"{source}: layer_types must be a list, not {abbreviated(kinds)}")
    if kinds and len(kinds) != layers:
        raise UserError(f"{source}: layer_types names {len(kinds)} layers, and num_hidden_layers is {layers}")


def _check_layer_types(config: HFConfig, window: int | None, source: str) -> None:
    kinds = config.get("layer_types") or ()
    _check_number_of_kinds(kinds, config["num_hidden_layers"], source)
    unlike = {str(kind) for kind in kinds} - {"sliding_attention" if window else "full_attention"}
    if unlike:
        raise UserError(
            f"{source}: layer_types holds {' and '.join(sorted({str(kind) for kind in kinds}))}; all layers must be "
            "alike, and " + (f"this model's window is {window} in all of them" if window else "without a window here")
        )
