"""Hypothesis strategy of programs of pickle opcodes, most of which an unpickler would execute to their end."""

import pickle
import struct
from collections.abc import Sequence

from hypothesis import strategies as st

ATTRIBUTES = (
    "_str", "__init__", "__globals__", "__getitem__", "__builtins__", "__class__", "__setstate__", "__reduce__",
    "__dict__", "_member_map_", "_value2member_map_", "__members__", "_value_", "dtype", "fqn", "offset", "chunks",
    "size", "sizes", "state_dict_metadata", "storage_data", "relative_path", "HYBRID", "margin", "fp8_format", "recipe",
    "scale_fwd", "extra_fp8_variables", "torch.strided", "TORCH_CONTIGUOUS_FORMAT",
)  # fmt: skip
VALUES = (
    pickle.NONE, pickle.NEWTRUE, pickle.EMPTY_TUPLE, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.BININT1 + b"\x02",
    pickle.LONG1 + b"\x09" + b"\xff" * 8 + b"\0", pickle.BINFLOAT + bytes(8), pickle.SHORT_BINBYTES + b"\1a",
    pickle.EMPTY_SET, pickle.BYTEARRAY8 + struct.pack("<Q", 1 << 30), pickle.LONG4 + struct.pack("<i", -1),
    pickle.EXT1 + b"\1", pickle.PERSID + b"a\n", pickle.BINBYTES8 + b"\xff" * 8, pickle.FRAME + b"\xff" * 8,
)  # fmt: skip
# How many values an opcode pops from the stack; each pushes one.
POPS = {
    pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3, pickle.REDUCE: 2, pickle.NEWOBJ: 2, pickle.NEWOBJ_EX: 3,
    pickle.BUILD: 2, pickle.APPEND: 2, pickle.SETITEM: 3, pickle.BINPERSID: 1, pickle.MEMOIZE: 1,
}  # fmt: skip
TO_MARK = (pickle.TUPLE, pickle.LIST, pickle.DICT, pickle.FROZENSET)
BELOW_MARK = (pickle.APPENDS, pickle.SETITEMS, pickle.ADDITEMS)


def text(value: str) -> bytes:
    """Opcodes that push a string (protocol 1)."""
    data = value.encode()
    return pickle.BINUNICODE + len(data).to_bytes(4, "little") + data


def name(module: str, attribute: str) -> bytes:
    """Opcodes that push a class or function by its name."""
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


@st.composite
def _states(draw: st.DrawFn) -> bytes:
    """Opcodes that push a state for BUILD: a table of attributes, or a pair with a table of slots."""
    table = (
        pickle.EMPTY_DICT + text(draw(st.sampled_from(ATTRIBUTES))) + draw(st.sampled_from(VALUES[:9])) + pickle.SETITEM
    )
    return draw(st.sampled_from((table, pickle.NONE + table + pickle.TUPLE2)))


@st.composite
def _actions(draw: st.DrawFn) -> bytes:
    """Opcodes that change or call the value on top of the stack and leave one value there."""
    value = draw(st.sampled_from(VALUES[:9]) | st.sampled_from(ATTRIBUTES).map(text))
    kinds = (
        draw(_states()) + pickle.BUILD,
        text(draw(st.sampled_from(ATTRIBUTES))) + value + pickle.SETITEM,
        value + pickle.APPEND,
        value + pickle.TUPLE1 + draw(st.sampled_from((pickle.REDUCE, pickle.NEWOBJ))),
        pickle.EMPTY_TUPLE + draw(st.sampled_from((pickle.REDUCE, pickle.NEWOBJ))),
    )
    return draw(st.sampled_from(kinds))


@st.composite
def programs(draw: st.DrawFn, names: Sequence[tuple[str, str]], valid: bytes) -> bytes:
    """A program alone, or in front of a valid pickle, whose value is then the result."""
    code, marks, memo = bytearray(), [0], 0
    for _ in range(draw(st.integers(1, 24))):
        kind = draw(st.integers(0, 13))
        if kind <= 2:
            module, attribute = draw(st.sampled_from(names))
            code += draw(
                st.sampled_from((name(module, attribute), text(module) + text(attribute) + pickle.STACK_GLOBAL))
            )
            marks[-1] += 1
        elif kind <= 4:
            code += draw(st.sampled_from(VALUES) | st.sampled_from(ATTRIBUTES).map(text))
            marks[-1] += 1
        elif kind == 5:
            code += pickle.MARK
            marks.append(0)
        elif kind == 6 and memo:
            code += pickle.BINGET + bytes([draw(st.integers(0, memo - 1))])
            marks[-1] += 1
        elif kind == 7 and len(marks) > 1:
            after = marks[-2] > 0 and draw(st.booleans())
            code += draw(st.sampled_from(BELOW_MARK if after else TO_MARK))
            marks.pop()
            marks[-1] += not after
        elif kind == 8:
            code += draw(_states())
            marks[-1] += 1
        elif kind >= 12 and marks[-1]:
            code += draw(_actions())
        else:
            possible = [opcode for opcode, count in POPS.items() if count <= marks[-1]]
            if possible:
                opcode = draw(st.sampled_from(possible))
                code += opcode
                memo += opcode == pickle.MEMOIZE
                marks[-1] -= POPS[opcode] - 1
    if draw(st.booleans()):
        return b"\x80\x04" + bytes(code) + pickle.STOP
    return b"\x80\x04" + bytes(code) + valid[2:]
