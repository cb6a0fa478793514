"""The rotary embedding that a `config.json` means, where several of its fields speak of one."""

from collections.abc import Mapping
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import is_number, shown

DEFAULT_THETA = 10000.0
"""transformers' `default_theta` of the dense families, and of the stock MoE ones but Mixtral."""
ORIGINAL_CONTEXT = "original_max_position_embeddings"
ROPE_PARAMETERS = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "yarn": ("rope_theta", "factor", ORIGINAL_CONTEXT),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", ORIGINAL_CONTEXT),
}
"""What each type of rotary embedding is computed from."""
# rope_scaling comes first: where both are there, transformers 5 reads it alone.
FIELDS = ("rope_scaling", "rope_parameters")


def read_rope(config: Mapping[str, Any], source: str, default_theta: float = DEFAULT_THETA) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and the type's own parameters, read as transformers 5 does.

    `rope_scaling` (transformers 4) counts unless it is absent, null or empty, else `rope_parameters` (transformers 5);
    the two are never mixed. A `rope_theta` in it counts before the one at the top level
    (`RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`).

    Args:
        source: names the file in messages.
        default_theta: where the configuration names none.

    Raises:
        UserError: a type that is not supported, a missing parameter, or two fields that contradict each other and that
            versions of transformers read differently.
    """
    rope = _chosen(config, source)
    _join_type(rope, source)
    _join_original_context(rope, config, source)
    rope.setdefault("rope_theta", config.get("rope_theta", default_theta))
    if not isinstance(rope["rope_type"], str) or rope["rope_type"] not in ROPE_PARAMETERS:
        known = "default, linear, llama3 and yarn"
        raise UserError(f"{source}: rope_type {shown(rope['rope_type'])} is not supported; {known} are")
    for name in ROPE_PARAMETERS[rope["rope_type"]]:
        # Megatron and transformers compute with them in fp32, and divide by them.
        if not is_number(rope.get(name), 1e-30, 1e30):
            raise UserError(f"{source}: rope's {name} must be a number above 0, not {shown(rope.get(name))}")
    if rope["rope_type"] == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise UserError(f"{source}: rope's high_freq_factor must be above its low_freq_factor")
    if rope["rope_type"] == "yarn":
        _check_yarn(rope, source)
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{source}: partial_rotary_factor other than 1 is not supported")
    return rope


def unread_rope_fields(config: Mapping[str, Any], rope: Mapping[str, Any]) -> list[str]:
    """Names of fields that say something else than `rope`, which `read_rope` has read from the others."""
    said = {name: config.get(name) or {} for name in FIELDS} | {
        "rope_theta": {"rope_theta": config.get("rope_theta") or rope["rope_theta"]}
    }
    return [
        name
        for name, entries in said.items()
        if any(rope.get("rope_type" if key == "type" else key) != value for key, value in entries.items())
    ]


def rope_of_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 4 takes from a dense configuration: `rope_theta` of the top level and `rope_scaling`."""
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or "default"
    return {"rope_type": kind, **scaling, "rope_theta": config.get("rope_theta", DEFAULT_THETA)}


def _chosen(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for name in FIELDS:
        value = config.get(name) or {}
        if not isinstance(value, Mapping):
            raise UserError(f"{source}: {name} must be a JSON object or null, not {shown(value)}")
        if any(isinstance(entry, Mapping) for entry in value.values()):
            raise UserError(f"{source}: {name} has an entry for each kind of layer; all layers must be alike")
        chosen = chosen or dict(value)
    return chosen


def _join_type(rope: dict[str, Any], source: str) -> None:
    """Write `type`, the older spelling, as `rope_type`."""
    older = rope.pop("type", None)
    kind = rope.setdefault("rope_type", "default" if older is None else older)
    if older not in (None, kind):
        raise UserError(
            f"{source}: rope_type is {shown(kind)} and type is {shown(older)}, and versions of transformers differ in "
            "which of them they read; remove the wrong one"
        )


def _join_original_context(rope: dict[str, Any], config: Mapping[str, Any], source: str) -> None:
    """Take the original context from the top level, as transformers 5 does for these two types."""
    outside = config.get(ORIGINAL_CONTEXT)
    if outside is None or ORIGINAL_CONTEXT not in ROPE_PARAMETERS.get(str(rope["rope_type"]), ()):
        return
    if rope.setdefault(ORIGINAL_CONTEXT, outside) != outside:
        raise UserError(
            f"{source}: {ORIGINAL_CONTEXT} is {shown(outside)}, and within rope_scaling or rope_parameters it is "
            f"{shown(rope[ORIGINAL_CONTEXT])}; remove the wrong one"
        )


def _check_yarn(rope: Mapping[str, Any], source: str) -> None:
    """Qwen's form: the factor and the original context, and perhaps betas and the attention factor."""
    optional = {"attention_factor", "beta_fast", "beta_slow"}
    for name in optional & rope.keys():
        if rope[name] is not None and not is_number(rope[name], 1e-30, 1e30):
            raise UserError(f"{source}: rope's {name} must be a number above 0, not {shown(rope[name])}")
    unknown = {name for name, value in rope.items() if value is not None} - {"rope_type", *optional}
    unknown -= {*ROPE_PARAMETERS["yarn"], "partial_rotary_factor"}
    if unknown:
        raise UserError(f"{source}: rope_type 'yarn' with {', '.join(sorted(unknown))} is not supported")
