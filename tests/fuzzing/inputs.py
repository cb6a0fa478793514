"""Hypothesis strategies of hostile files: corrupted bytes, corrupted JSON, and files that once did harm."""

import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 10**9, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 1.5, 1e308, -0.0])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
KNOWN = [
    b"",
    b"\0",
    b"[]",
    b"{}",
    b"null",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"a": "\\ud800"}',
    b"9" * 5000,
    b"\xff" * 64,
    (2).to_bytes(8, "little") + b"[]",
    (100_000).to_bytes(8, "little") + b"[" * 100_000,
    b"\x80\x02r\xff\xff\xff\x7f.",
    b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".",
]


@st.composite
def corrupted_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid file with bytes changed, removed or inserted, or cut short."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(("change", "number", "cut", "insert", "end")))
        if kind == "change" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "number":
            size = draw(st.sampled_from((4, 8)))
            value = draw(st.sampled_from((0, 1, -1, 2**31 - 1, -(2**31), 7)))
            data[place : place + size] = value.to_bytes(size, "little", signed=True)
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=20))
        else:
            del data[place:]
    return bytes(data)


@st.composite
def corrupted_json(draw: st.DrawFn, valid: Any, frame: Any = None) -> bytes:
    """A valid JSON value with some inner values replaced or removed; `frame` turns its text into a file."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        value = _replaced(draw, value)
    text = json.dumps(value).encode()
    return frame(text) if frame else text


def _replaced(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    if isinstance(value, dict) and draw(st.integers(0, 7)) == 0:
        del value[key]
    else:
        value[key] = _replaced(draw, value[key])
    return value


def hostile_files(valid: bytes) -> st.SearchStrategy[bytes]:
    """Corrupted forms of a valid file, of every kind."""
    kinds = [st.sampled_from(KNOWN), corrupted_bytes(valid), st.binary(max_size=80)]
    try:
        kinds += [corrupted_json(json.loads(valid))] * 3
    except (ValueError, UnicodeDecodeError):
        header = _safetensors_header(valid)
        if header is not None:
            rest = valid[8 + len(header) :]
            kinds += [
                corrupted_json(json.loads(header), lambda text: len(text).to_bytes(8, "little") + text + rest)
            ] * 3
    return st.one_of(kinds)


def _safetensors_header(data: bytes) -> bytes | None:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length] if data[8:9] == b"{" and length <= len(data) else None
