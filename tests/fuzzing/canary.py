"""A function that no reader may call, and what a pickle could change of a process for good."""

import enum
import importlib
from collections.abc import Iterable

CALLS: list[tuple] = []


def run(*arguments: object) -> None:
    """Leave a trace."""
    CALLS.append(arguments)


def state_of(names: Iterable[tuple[str, str]]) -> dict[tuple[str, ...], object]:
    """Attributes of classes and functions by identity, and what is in the tables of enumerations."""
    state: dict[tuple[str, ...], object] = {}
    for module, name in names:
        found = getattr(importlib.import_module(module), name, None)
        for attribute, value in vars(found).items() if hasattr(found, "__dict__") else ():
            state[module, name, attribute] = id(value)
        if isinstance(found, type) and issubclass(found, enum.Enum):
            for member in found:
                state[module, name, member.name, "vars"] = repr(vars(member))
            state[module, name, "tables"] = repr((found._member_map_, found._value2member_map_))
    return state | {("canary",): len(CALLS)}
