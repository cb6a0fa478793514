"""What this package puts in the place of Megatron-Core's and torch's own code, checked to be there.

An attribute that another version has renamed could still be set, and a method of the old name still be defined. Nothing
would fail: Megatron's own code would run instead, for example its checkpoint writer. Two functions stand against that:

- `replace` sets attributes of modules, classes and objects, and only those that are there.
- `overrides_megatron` decorates each class with a base of Megatron's. Each of its methods that has a name of the base's
  must be marked with `@override`, and each marked method must have one.

That the replacements are then what Megatron calls is tested, for every entry of `REPLACEMENTS` (tests/megatron).
"""

import dataclasses
import inspect
import re
import types
from collections.abc import Callable
from typing import Any, TypeVar

from typing_extensions import override

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.megatron.versions import installed_version

__all__ = ["CHECKED", "REPLACEMENTS", "override", "overrides_megatron", "replace", "supply"]

Class = TypeVar("Class", bound=type)
PACKAGE = __name__.partition(".")[0]
REPLACEMENTS: dict[str, Any] = {}
"""What this process has replaced: by OWNER.NAME of an attribute, and of a method that overrides by its own name."""
CHECKED: list[type] = []
"""Classes that `overrides_megatron` has checked."""


def replace(owner: object, **replacements: object) -> None:
    """Put replacements in the place of the attributes of these names.

    Args:
        owner: a module, a class or an object of Megatron-Core or torch.

    Raises:
        UserError: the owner has no such attribute: its own code, under another name, would run without a word.
    """
    for name, replacement in replacements.items():
        if not hasattr(owner, name):
            raise _missing(_name_of(owner), name)
        setattr(owner, name, replacement)
        REPLACEMENTS[f"{_name_of(owner)}.{name}"] = replacement


def supply(module: types.ModuleType, **values: object) -> None:
    """Define global names that a module's functions use, and that it lacks where some library is not installed.

    Raises:
        UserError: nothing in the module uses such a name: it has another.
    """
    source = inspect.getsource(module)
    for name, value in values.items():
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise _missing(module.__name__, name)
        setattr(module, name, value)
        REPLACEMENTS[f"{module.__name__}.{name}"] = value


def overrides_megatron(kind: Class) -> Class:
    """Check the methods and the dataclass fields of a class against its bases of Megatron's and torch's.

    Raises:
        UserError: a method that is marked with `@override` has nothing to override, or one that is not marked has; a
            field has the name of a base's.
    """
    theirs = [one for one in kind.__mro__ if not _is_ours(one) and one is not object]
    for one in filter(_is_ours, kind.__mro__):
        for name, value in vars(one).items():
            _check_method(one, name, value, next((base for base in theirs if name in vars(base)), None), theirs)
        for base in filter(dataclasses.is_dataclass, theirs):
            for name in vars(one).get("__annotations__", {}).keys() & vars(base).get("__annotations__", {}).keys():
                raise _unmeant(base, name, one)
    CHECKED.append(kind)
    return kind


def _check_method(one: type, name: str, value: object, owner: type | None, bases: list[type]) -> None:
    if _is_marked(value):
        if owner is None:
            raise _missing(" or ".join(map(_name_of, bases)), name, _name_of(one))
        REPLACEMENTS[f"{_name_of(one)}.{name}"] = value
    elif owner is not None and inspect.isroutine(value) and not name.startswith("__"):
        raise _unmeant(owner, name, one)


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == PACKAGE


def _is_marked(value: object) -> bool:
    function: Callable[..., Any] | object = getattr(value, "__func__", value)
    return getattr(function, "__override__", False) is True


def _name_of(owner: object) -> str:
    if inspect.ismodule(owner):
        return owner.__name__
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}"


def _missing(owner: str, name: str, by: str = PACKAGE) -> UserError:
    return UserError(
        f"{_versions()}: {owner} has no {name}, which {by} replaces; install a version that setup.py allows"
    )


def _unmeant(owner: type, name: str, one: type) -> UserError:
    return UserError(
        f"{_versions()}: {_name_of(owner)} has a {name}, and {_name_of(one)} another that is not meant for it; "
        "install a version that setup.py allows"
    )


def _versions() -> str:
    return f"megatron-core {installed_version()}"
