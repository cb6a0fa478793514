"""Base models that are mixtures themselves: what their `config.json` says beside the fields of a dense model.

All experts of such a model are original ones, frozen, and so are its router's rows and its shared expert.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import abbreviated, checked_integer, is_integer, optional_bool, required_int

MAX_EXPERTS = 1024
MAX_LAYERS = 1000
MAX_SIZE = 1 << 24


@dataclasses.dataclass(frozen=True)
class ExpertFields:
    """Names of the fields of a stock mixture's `config.json` that number its experts."""

    counts: tuple[str, ...] = ("num_local_experts", "num_experts")
    """Fields that may name the number of experts of a layer, by default Mixtral's and Qwen's."""
    top_k: str = "num_experts_per_tok"
    """Experts of a token."""


USUAL_FIELDS = ExpertFields()
EXPERT_FIELDS: Mapping[str, ExpertFields] = {}
"""By `model_type` the stock mixtures that have other names than the usual ones, as `moe_num_experts` and `moe_k`."""


def expert_fields(config: Mapping[str, Any]) -> ExpertFields:
    """Return the names that a configuration has for its numbers of experts."""
    return EXPERT_FIELDS.get(config["model_type"], USUAL_FIELDS)


RENORMALISED = frozenset({"granitemoe", "mixtral"})
"""Architectures without a switch for it, in which the weights of a token's experts add up to 1."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "granitemoe": {"num_experts_per_tok": 2},
    "mixtral": {"num_key_value_heads": 8, "num_experts_per_tok": 2},
    "olmoe": {"num_experts_per_tok": 8},
    "qwen2_moe": {
        "num_key_value_heads": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3_moe": {"num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
}
"""By `model_type`: what transformers' class takes where the configuration lacks a field."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Experts of a base model that is a mixture."""

    experts: tuple[int, ...]
    """Experts of each layer; 1: a layer without a router."""
    top_k: int
    """Experts of a token."""
    renormalised: bool
    """The weights of a token's experts add up to 1 (`norm_topk_prob`); otherwise they are their probabilities."""
    shared_expert_size: int = 0
    """Width of the gated FFN that every token passes beside its experts; 0: none."""

    @property
    def num_experts(self) -> int:
        """Experts of the layers that have a router."""
        return max(self.experts)


def with_mixture_defaults(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a mixture's configuration with the defaults of its class, and the experts' width as `intermediate_size`.

    Raises:
        UserError: a switch of the architecture that is not supported.
    """
    model_type = config["model_type"]
    full = {**DEFAULTS[model_type], **config}
    if "moe_intermediate_size" not in full:
        return full
    if full.get("use_sliding_window"):
        raise UserError(f"{source}: use_sliding_window=true is not supported for {model_type}")
    if model_type == "qwen2_moe" and not full.get("qkv_bias", True):
        raise UserError(f"{source}: qkv_bias=false is not supported for qwen2_moe")
    if model_type == "qwen3_moe" and full.get("attention_bias"):
        raise UserError(f"{source}: attention_bias=true is not supported for qwen3_moe")
    width, dense = full["moe_intermediate_size"], full.get("intermediate_size")
    if 1 in experts_by_layer(full, source) and dense != width:
        raise UserError(
            f"{source}: experts ({abbreviated(width)}) and dense layers ({abbreviated(dense)}) must have the same "
            "intermediate size"
        )
    return full | {"intermediate_size": width}


def read_mixture(config: Mapping[str, Any], source: str) -> Mixture:
    """Read what a mixture's configuration says of its experts; `source` names the file in error messages.

    Raises:
        UserError: a missing field, one out of range, or a routing that no layer here computes.
    """
    full = {**DEFAULTS[config["model_type"]], **config}
    experts = experts_by_layer(full, source)
    most = max(experts)
    if most == 1:
        raise UserError(f"{source}: no layer has more than one expert; give the dense model instead")
    name = expert_fields(full).top_k
    top_k = checked_integer(full[name], name, source, 1, most)
    renormalised = config["model_type"] in RENORMALISED or optional_bool(full, "norm_topk_prob", source)
    if top_k == 1 and renormalised:
        raise UserError(f"{source}: one expert per token, weighted by 1: its router would get no gradient")
    shared = 0
    if config["model_type"] == "qwen2_moe":
        name = "shared_expert_intermediate_size"
        shared = checked_integer(full[name], name, source, 1, MAX_SIZE)
    return Mixture(tuple(experts), top_k, renormalised, shared)


def experts_by_layer(config: Mapping[str, Any], source: str) -> list[int]:
    """Return the number of experts of each layer of a stock mixture's configuration; 1 for a dense layer.

    Raises:
        UserError: a field is missing, or not such a number or list; or two fields that contradict each other.
    """
    counts = expert_fields(config).counts
    given = {name: config[name] for name in counts if config.get(name) is not None}
    if len(set(map(abbreviated, given.values()))) > 1:
        stated = " and ".join(f"{name} is {abbreviated(value)}" for name, value in given.items())
        raise UserError(
            f"{source}: {stated}, and versions of transformers differ in which of them they read; remove the wrong one"
        )
    name = next(iter(given), counts[-1])
    experts = required_int(config, name, source, 1, MAX_EXPERTS)
    layers = required_int(config, "num_hidden_layers", source, 1, MAX_LAYERS)
    dense = config.get("mlp_only_layers") or []
    if config["model_type"] == "cohere2_moe":
        kinds = config.get("mlp_layer_types") or ["sparse"] * layers
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise UserError(f"{source}: mlp_layer_types must be a list of {layers} layers' kinds")
        dense = [layer for layer, kind in enumerate(kinds) if kind == "dense"]
    if not isinstance(dense, list) or not all(is_integer(layer, 0, layers - 1) for layer in dense):
        raise UserError(f"{source}: mlp_only_layers must be a list of layers from 0 to {layers - 1}")
    step = checked_integer(config.get("decoder_sparse_step", 1), "decoder_sparse_step", source, 1, MAX_LAYERS)
    chosen = set(dense)
    return [1 if layer in chosen or (layer + 1) % step else experts for layer in range(layers)]
