"""What this package puts in the place of Megatron-Core's and torch's own code, checked to be there.

An attribute that another version has renamed could still be set, and a method of the old name still be defined. Nothing
would fail: Megatron's own code would run instead, for example its checkpoint writer. Two functions stand against that:

- `replace` sets attributes of modules, classes and objects, and only those that are there.
- `overrides_megatron` decorates each class with a base of Megatron's. Each of its methods that has a name of the base's
  must be marked with `@override`, and each marked method must have one.

That the replacements are then what Megatron calls is tested, for every entry of `REPLACEMENTS` (tests/megatron).
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from typing_extensions import override

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.megatron.versions import installed_version

__all__ = ["REPLACEMENTS", "override", "overrides_megatron", "replace"]

Class = TypeVar("Class", bound=type)
PACKAGE = __name__.partition(".")[0]
REPLACEMENTS: dict[str, Any] = {}
"""By what it replaces, MODULE.NAME or MODULE.CLASS.NAME: each method and attribute of this process."""


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


def overrides_megatron(kind: Class) -> Class:
    """Check the methods of a class against its bases that are not of this package, Megatron's and torch's.

    Raises:
        UserError: a method that is marked with `@override` has nothing to override, or one that is not marked has.
    """
    ours = [one for one in kind.__mro__ if _is_ours(one)]
    theirs = [one for one in kind.__mro__ if not _is_ours(one) and one is not object]
    for one in ours:
        for name, value in vars(one).items():
            owner = next((base for base in theirs if name in vars(base)), None)
            if _is_marked(value):
                if owner is None:
                    raise _missing(" or ".join(_name_of(base) for base in theirs), name, _name_of(one))
                REPLACEMENTS[f"{_name_of(owner)}.{name}"] = value
            elif owner is not None and inspect.isroutine(value) and not name.startswith("__"):
                raise UserError(
                    f"{_versions()}: {_name_of(owner)} has a method {name}, and {_name_of(one)} has another of that "
                    "name that is not meant for it; install a version that setup.py allows"
                )
    return kind


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


def _versions() -> str:
    return f"megatron-core {installed_version()}"
