"""Members of enumerations in pickles that are not trusted."""

import enum
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_moe_lpr.checkpoint.untrusted.restricted_pickle import Call, Name, whole_number

GETATTR = Name("builtins", "getattr")
"""What the first releases of Python 3.11, Debian 12's among them, pickle a member with: a function that can do
anything, described and never called."""
Member = TypeVar("Member", bound=enum.Enum)


def enum_member(found: Any, kind: type[Member], value: Callable[[Any], Any] = whole_number) -> Member:
    """The member of `kind` that a pickle describes, by its value or by `getattr` and its name.

    Args:
        found: what `read_pickle` returned in its place.
        value: from the description of a member's value to the value; raises where it is none.

    Raises:
        pickle.UnpicklingError: it describes something else.
    """
    arguments = found.arguments if type(found) is Call and not found.is_new else ()
    own = Name(kind.__module__, kind.__name__)
    if arguments and found.function == GETATTR:
        if (
            len(arguments) != 2
            or type(arguments[0]) is not Name
            or arguments[0] != own
            or type(arguments[1]) is not str
        ):
            raise pickle.UnpicklingError("it reads an attribute of something else than an enumeration")
        if arguments[1] in kind.__members__:
            return kind[arguments[1]]
    elif len(arguments) == 1 and found.function == own:
        made = value(arguments[0])
        for member in kind:
            if member.value == made:
                return member
    raise pickle.UnpicklingError(f"it names no member of {kind.__name__}")
