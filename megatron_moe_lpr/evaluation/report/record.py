"""What a file of tools/evaluate.py must look like for the report to read it."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from megatron_moe_lpr.files.json_files import is_integer, is_number
from megatron_moe_lpr.model.moe.routing_groups import GROUPS


def is_evaluation(record: Any) -> bool:
    """Whether every field that the report reads is there and of its type."""
    if not isinstance(record, dict) or not all(
        is_integer(record.get(name), 1) for name in ("sequence_length", "top_k")
    ):
        return False
    experts, averages, datasets = (record.get(name) for name in ("experts_per_layer", "averages", "datasets"))
    return (
        _are(experts, lambda value: is_integer(value, 1))
        and bool(experts)
        and isinstance(averages, dict)
        and all(_is_averages(averages.get(group)) for group in GROUPS)
        and _are(datasets, lambda one: _is_dataset(one, len(experts)))
    )


def is_list_of_texts(value: Any, names: Sequence[str]) -> bool:
    """Whether a value is a list of objects that hold text under each of `names`."""
    return _are(value, lambda one: isinstance(one, dict) and all(isinstance(one.get(name), str) for name in names))


def are_costs(value: Any) -> bool:
    """Whether a value gives models by their titles the numbers that the table shows."""
    names = ("parameters", "active_parameters", "generated_tokens_per_second")
    return isinstance(value, dict) and all(
        isinstance(one, dict) and all(is_number(one.get(name)) and one[name] > 0 for name in names)
        for one in value.values()
    )


def are_curves(value: Any) -> bool:
    """Whether a value is a list of curves: texts, and points with a value and files."""
    return is_list_of_texts(value, ("title", "caption", "setting")) and all(
        is_list_of_texts(one.get("points"), ("value",))
        and one["points"]
        and all(_are(point.get("evaluations"), lambda file: isinstance(file, str)) for point in one["points"])
        and all(point["evaluations"] for point in one["points"])
        for one in value
    )


def _are(value: Any, check: Callable[[Any], bool]) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and all(map(check, value))


def _is_optional(value: Any) -> bool:
    return value is None or is_number(value)


def _is_averages(value: Any) -> bool:
    if not isinstance(value, dict) or "bits_per_byte" not in value:
        return False
    return all(_is_optional(value.get(name)) for name in ("bits_per_byte", "expert0_top_k_share"))


def _is_dataset(one: Any, layers: int) -> bool:
    return (
        isinstance(one, dict)
        and isinstance(one.get("language"), str)
        and isinstance(one.get("name", ""), str)
        and isinstance(one.get("group"), str)
        and one["group"] in GROUPS
        and is_integer(one.get("tokens"))
        and {"bits_per_byte", "routing"} <= one.keys()
        and _is_optional(one["bits_per_byte"])
        and (one["routing"] is None or _is_routing(one["routing"], layers))
    )


def _is_routing(routing: Any, layers: int) -> bool:
    shares = routing.get("expert0_top_k_share") if isinstance(routing, dict) else None
    return _are(shares, _is_optional) and len(shares) == layers
