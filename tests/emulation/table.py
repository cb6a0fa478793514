"""What the compiled extension of the installed Transformer Engine has: functions, types of arguments, enumerations.

Read from tests/emulation/tables/VERSION.txt, which write_table.py writes from the C++ sources of that version.
"""

import dataclasses
import enum
import functools
import operator
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

TABLES = Path(__file__).parent / "tables"
VERSIONS = tuple(sorted((path.stem for path in TABLES.glob("*.txt")), key=Version))
"""Versions of Transformer Engine that the emulation knows, oldest first."""


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of a function of the extension; its type in the terms of Python."""

    name: str
    type: str
    optional: bool
    positional_only: bool


Signature = tuple[Argument, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """The extension of one version."""

    version: str
    functions: dict[str, Signature]
    enumerations: dict[str, dict[str, int]]
    classes: tuple[str, ...]
    lines: dict[str, str]
    """Every line of the file by the name that it describes."""

    def at_least(self, version: str) -> bool:
        """Whether the extension is of this version or a newer one."""
        return Version(self.version) >= Version(version)

    @property
    def names(self) -> set[str]:
        """All that `dir` of the extension would give."""
        return {name.split(".")[0] for name in (*self.functions, *self.enumerations, *self.classes)}


@functools.cache
def read(version: str) -> Table:
    """The table of a version of Transformer Engine; FileNotFoundError where there is none."""
    table = Table(version, {}, {}, (), {})
    classes = []
    for line in (TABLES / f"{version}.txt").read_text().splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "class":
            classes.append(rest)
            table.lines[rest] = line
        elif kind == "enum":
            name, _, members = rest.partition(": ")
            pairs = (member.split("=") for member in members.split())
            table.enumerations[name] = {member: int(value) for member, value in pairs}
            table.lines[name] = line
        else:
            name, _, arguments = line.removesuffix(")").partition("(")
            table.functions[name] = tuple(_arguments(arguments))
            table.lines[name] = line
    return dataclasses.replace(table, classes=tuple(classes))


def _arguments(text: str) -> Iterator[Argument]:
    positional_only = text.endswith("/")
    for part in re.split(r", (?=\w+:|\*|/)", text) if text else []:
        if part in ("*", "/"):
            continue
        name, _, rest = part.partition(": ")
        kind, default, _ = rest.partition(" = ")
        yield Argument(name, kind, bool(default), positional_only)


def installed() -> str:
    """Version of Transformer Engine's Python part; of the oldest table where it is not installed or has no table."""
    try:
        version = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return VERSIONS[0]
    return version if version in VERSIONS else VERSIONS[0]


TABLE = read(installed())
ENUMERATIONS: dict[str, type[enum.IntEnum]] = {
    name: enum.IntEnum(name, members) for name, members in TABLE.enumerations.items()
}

Check = Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) and hasattr(type(value), "__float__")


# As pybind11 converts: None is False, an integer is a float, a float is no integer.
_CHECKS: dict[str, Check] = {
    "Tensor": lambda value: isinstance(value, torch.Tensor),
    "int": _is_integer,
    "float": _is_number,
    "bool": lambda value: value is None or hasattr(type(value), "__bool__"),
    "str": lambda value: isinstance(value, str | bytes),
    "torch.dtype": lambda value: isinstance(value, torch.dtype),
    "torch.device": lambda value: isinstance(value, torch.device),
    "torch.Generator": lambda value: isinstance(value, torch.Generator),
}


@functools.cache
def check_for(kind: str) -> Check:
    """Whether pybind11 would convert a value to a type of the table."""
    if kind.endswith(" | None"):
        inner = check_for(kind.removesuffix(" | None"))
        return lambda value: value is None or inner(value)
    if kind.startswith("list["):
        item = check_for(kind[len("list[") : -1])
        return lambda value: isinstance(value, list | tuple) and all(item(part) for part in value)
    if kind == "DType" and TABLE.at_least("2.17"):
        # csrc/extensions/pybind_dtype_caster.h: an integer that is a format's number, as constants.py `DType` is.
        return lambda value: _is_integer(value) and int(value) in TABLE.enumerations["DType"].values()
    if kind in ENUMERATIONS:
        return lambda value: isinstance(value, ENUMERATIONS[kind])
    if kind in TABLE.classes:
        return lambda value: value is None  # a pointer; the emulation has no such objects
    return _CHECKS.get(kind, lambda value: True)
