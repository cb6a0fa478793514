"""Members of enumerations in pickles that are not trusted."""

import enum
import pickle
from typing import Any


def enum_member(kind: Any, name: str) -> enum.Enum:
    """What the first releases of Python 3.11, Debian 12's among them, use `getattr` for in a pickle, and no more.

    Raises:
        pickle.UnpicklingError: it is used for something else.
        KeyError: no such member.
    """
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError("it reads an attribute of something else than an enumeration")
    return kind[name]
