"""A function that no reader may call, and a snapshot of what a pickle could change in this process."""

import enum
import importlib
from collections.abc import Iterable

CALLS: list[tuple] = []


def run(*arguments: object) -> None:
    """Record the call."""
    CALLS.append(arguments)


def snapshot(names: Iterable[tuple[str, str]]) -> dict[tuple[str, ...], object]:
    """Snapshot of the named classes and functions: identities of their attributes, and tables of enumerations."""
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
