"""Small JSON files that come from elsewhere: read whole, refused with a reason, their values checked one by one."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from megatron_moe_lpr.errors import DamagedFile, UserError

MAX_BYTES = 256 << 20
"""Far above any configuration, manifest or index; Python's objects take some ten times as much memory."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DamagedFile: something else than a JSON object is in it.
        UserError: no such file, or it cannot be read.
    """
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes; no JSON file of this kind is that large")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return parse_json_object(data, str(path))
    except UserError as error:
        raise DamagedFile(str(error), path) from None


def parse_json_object(data: bytes, source: str) -> dict[str, Any]:
    """The JSON object in `data`; `source` names it in messages.

    Raises:
        UserError: not JSON, nested too deeply, a name given twice, text that is no Unicode, or not an object.
    """
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_once)
        if b"\\u" in data:
            # An escaped half of a surrogate pair cannot be written or printed again.
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise UserError(f"{source}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: a JSON object is expected")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name is given twice")
    return content


def is_integer(value: object, low: int = 0, high: int = 2**63 - 1) -> TypeGuard[int]:
    """Whether a value is a whole number in a range; true and false are none."""
    return type(value) is int and low <= value <= high


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> TypeGuard[float]:
    """Whether a value is a finite number in a range."""
    if not (type(value) is int or type(value) is float):
        return False
    try:
        return math.isfinite(value) and low <= value <= high
    except OverflowError:  # an integer beyond any float
        return False


def integer(fields: Mapping[str, Any], name: str, source: str, low: int, high: int) -> int:
    """A required field that is a whole number in a range.

    Raises:
        UserError: it is missing, of another type, or out of range.
    """
    if name not in fields:
        raise UserError(f"{source}: the field '{name}' is missing")
    return checked_integer(fields[name], name, source, low, high)


def checked_integer(value: object, name: str, source: str, low: int, high: int) -> int:
    """`value`, a whole number in a range.

    Raises:
        UserError: it is something else.
    """
    if not is_integer(value, low, high):
        raise UserError(f"{source}: {name} must be a whole number from {low} to {high}, not {shown(value)}")
    return value


def number(fields: Mapping[str, Any], name: str, default: float, source: str, low: float, high: float) -> float:
    """An optional field that is a finite number in a range.

    Raises:
        UserError: it is something else.
    """
    value = fields.get(name, default)
    if not is_number(value, low, high):
        raise UserError(f"{source}: {name} must be a number from {low:g} to {high:g}, not {shown(value)}")
    return float(value)


def switch(fields: Mapping[str, Any], name: str, source: str, default: bool = False) -> bool:
    """An optional field that is true or false; null is the default.

    Raises:
        UserError: it is something else.
    """
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"{source}: {name} must be true or false, not {shown(value)}")
    return value


def shown(value: object, width: int = 40) -> str:
    """A value for a message: its beginning."""
    if isinstance(value, dict | list):
        return f"a {'JSON object' if isinstance(value, dict) else 'list'}"
    if type(value) is int and value.bit_length() > 200:
        return "a number of very many digits"
    text = repr(value)
    return text if len(text) <= width else f"{text[:width]}..."
