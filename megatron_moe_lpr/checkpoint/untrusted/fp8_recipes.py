"""Transformer Engine's FP8 recipes out of pickles that are not trusted: made by their own constructors.

The classes are those of the installed Transformer Engine; a recipe with a function in it is refused.
"""

import dataclasses
import enum
import importlib
import pickle
from types import ModuleType
from typing import Any

from megatron_moe_lpr.checkpoint.untrusted.enumerations import GETATTR, enum_member
from megatron_moe_lpr.checkpoint.untrusted.restricted_pickle import Call, Name

RECIPE_MODULE = "transformer_engine.common.recipe"
# Megatron's subclass of Transformer Engine's recipe: the one that delayed scaling is saved with.
MEGATRON_RECIPE = Name("megatron.core.extensions.transformer_engine", "TEDelayedScaling")


def is_allowed(module: str, name: str) -> bool:
    """Whether a name is one that a recipe needs: a class of the module of recipes."""
    if (module, name) in (GETATTR, MEGATRON_RECIPE):
        return True
    return module == RECIPE_MODULE and _class(name) is not None


def is_recipe(value: Any) -> bool:
    """Whether a value that `rebuild` made is a recipe."""
    return isinstance(value, vars(_module())["Recipe"])


def rebuild(found: Call) -> Any:
    """A recipe, its parameters or a member of an enumeration of formats, from its description.

    Raises:
        pickle.UnpicklingError: it describes something else.
        ValueError: a value that its class refuses.
    """
    owner = found.arguments[0] if found.function == GETATTR and found.arguments else found.function
    kind = _named(owner) if type(owner) is Name else None
    if kind is not None and issubclass(kind, enum.Enum):
        return enum_member(found, kind, _enumerated)
    is_made = found.is_new and not found.arguments and isinstance(found.state, dict)
    if kind is None or not is_made or not dataclasses.is_dataclass(kind):
        raise pickle.UnpicklingError(f"it calls {found.function.module}.{found.function.name} in another way")
    return _dataclass(kind, found.state)


def _dataclass(kind: type, state: dict[Any, Any]) -> Any:
    values = {name: _field(value) for name, value in state.items() if type(name) is str and not name.startswith("_")}
    if len(values) != len(state):
        raise pickle.UnpicklingError(f"a {kind.__name__} has a field that is none")
    # Megatron's subclass has a constructor of its own, which asks for a configuration.
    base: Any = next(one for one in kind.__mro__ if one.__module__ == RECIPE_MODULE)
    made: Any = object.__new__(kind)
    fields = {field.name for field in dataclasses.fields(base)}
    base.__init__(made, **{name: value for name, value in values.items() if name in fields})
    for name, value in values.items():
        # Beside its fields a recipe has parameters that follow from them; another version's are left out.
        if name not in fields and type(getattr(made, name, None)) is type(value):
            object.__setattr__(made, name, value)
    return made


def _field(found: Any) -> Any:
    if found is None or type(found) in (bool, float, str) or (type(found) is int and abs(found) < 1 << 31):
        return found
    if type(found) is tuple and all(type(value) in (bool, int, float, str) for value in found):
        return found
    if type(found) is Call:
        return rebuild(found)
    raise pickle.UnpicklingError(f"a {type(found).__name__} is no value of a recipe")


def _enumerated(found: Any) -> Any:
    """A format's value is the pair of its largest numbers, which is pickled as an object."""
    if type(found) is Call and _named(found.function) is not None:
        found = found.arguments
    values = found if type(found) is tuple else (found,)
    if not all(type(value) in (int, float, str) for value in values):
        raise pickle.UnpicklingError("a member of an enumeration has another value")
    return found


def _named(name: Name) -> type | None:
    if name == MEGATRON_RECIPE:
        return getattr(importlib.import_module(name.module), name.name)
    return _class(name.name) if name.module == RECIPE_MODULE else None


def _module() -> ModuleType:
    return importlib.import_module(RECIPE_MODULE)


def _class(name: str) -> type | None:
    found = vars(_module()).get(name)
    return found if isinstance(found, type) and found.__module__ == RECIPE_MODULE else None
