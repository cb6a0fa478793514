"""`--experts-per-layer`: a list of numbers, or the JSON file that `moe-lpr allocate` writes."""

from pathlib import Path

from megatron_moe_lpr.checkpoint.format.card import check_experts
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json

FLAG = "--experts-per-layer"
FIELD = "experts_per_layer"


def read_experts_per_layer(text: str, num_layers: int) -> list[int]:
    """Read the flag: experts of each layer, the original one included; 1: the layer stays dense.

    Args:
        text: `5,4,3`, or a path that ends in .json.

    Raises:
        UserError: neither of these, or not for a model of this many layers.
    """
    is_file = text.endswith(".json")
    values = read_json(Path(text)).get(FIELD) if is_file else [_number(part) for part in text.split(",")]
    if not isinstance(values, list) or not all(type(value) is int and value >= 1 for value in values):
        raise UserError(f"{FLAG} {text}: numbers of 1 or more are expected, as in 5,4,3, or a JSON file with {FIELD}")
    if len(values) != num_layers:
        raise UserError(f"{FLAG} {text}: names {len(values)} layers, and the model has {num_layers}")
    check_experts(values, f"{FLAG} {text}")
    return values


def format_experts_per_layer(experts: list[int]) -> str:
    """Numbers of experts as the flag takes them, `5,4,3`."""
    return ",".join(map(str, experts))


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) < 10 else None
