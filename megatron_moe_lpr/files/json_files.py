"""Small JSON files: written atomically; untrusted ones read with checks, their values validated one by one."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from megatron_moe_lpr.errors import DamagedFile, UserError
from megatron_moe_lpr.files.atomic_file import atomic_file

MAX_BYTES = 256 << 20
"""Far above any configuration, manifest or index; Python's objects take some ten times as much memory."""


def write_json(content: Mapping[str, Any] | list, path: Path, sort_keys: bool = False) -> None:
    """Write a JSON file that appears whole or not at all: UTF-8, two spaces of indentation.

    Raises:
        OSError: the disk is full, or the file cannot be made. It may name no file.
    """
    text = json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, as a file name that is not UTF-8 has: only escapes hold it
        data = json.dumps(content, indent=2, sort_keys=sort_keys).encode("ascii")
    with atomic_file(path) as partial:
        partial.write_bytes(data + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DamagedFile: the file does not hold a JSON object.
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
    """Parse a JSON object; `source` names the data in messages.

    Raises:
        UserError: not JSON, nested too deeply, a repeated name, text that is not Unicode, or not an object.
    """
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=refuse_repeated_names)
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


def refuse_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object (an `object_pairs_hook`). A flipped bit can turn one name into another one that exists.

    Raises:
        ValueError: a name is given twice; the json module would silently keep the last one.
    """
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name is given twice")
    return content


def is_integer(value: object, low: int = 0, high: int = 2**63 - 1) -> TypeGuard[int]:
    """Whether a value is an int from `low` to `high`; true and false are not."""
    return type(value) is int and low <= value <= high


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> TypeGuard[float]:
    """Whether a value is a finite int or float from `low` to `high`."""
    if not (type(value) is int or type(value) is float):
        return False
    try:
        return math.isfinite(value) and low <= value <= high
    except OverflowError:  # an integer beyond any float
        return False


def required_int(fields: Mapping[str, Any], name: str, source: str, low: int, high: int) -> int:
    """The field `name`, an int from `low` to `high`.

    Raises:
        UserError: it is missing, of another type, or out of range; `source` names the file.
    """
    if name not in fields:
        raise UserError(f"{source}: the field '{name}' is missing")
    return checked_integer(fields[name], name, source, low, high)


def checked_integer(value: object, name: str, source: str, low: int, high: int) -> int:
    """Return `value` if it is an int from `low` to `high`.

    Raises:
        UserError: it is something else; `source` names the file and `name` the field.
    """
    if not is_integer(value, low, high):
        raise UserError(f"{source}: {name} must be a whole number from {low} to {high}, not {abbreviated(value)}")
    return value


def optional_float(fields: Mapping[str, Any], name: str, default: float, source: str, low: float, high: float) -> float:
    """The field `name`, a finite number from `low` to `high`; `default` where it is missing.

    Raises:
        UserError: it is something else; `source` names the file.
    """
    value = fields.get(name, default)
    if not is_number(value, low, high):
        raise UserError(f"{source}: {name} must be a number from {low:g} to {high:g}, not {abbreviated(value)}")
    return float(value)


def optional_bool(fields: Mapping[str, Any], name: str, source: str, default: bool = False) -> bool:
    """The field `name`, true or false; `default` where it is missing or null.

    Raises:
        UserError: it is something else; `source` names the file.
    """
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"{source}: {name} must be true or false, not {abbreviated(value)}")
    return value


def abbreviated(value: object, width: int = 40) -> str:
    """A short text for a value in a message: its kind, or the first `width` characters of its repr."""
    if isinstance(value, dict | list):
        return f"a {'JSON object' if isinstance(value, dict) else 'list'}"
    if type(value) is int and value.bit_length() > 200:
        return "a number of very many digits"
    text = repr(value)
    return text if len(text) <= width else f"{text[:width]}..."
