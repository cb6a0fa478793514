"""A stand-in of Transformer Engine's module of recipes, for processes without Transformer Engine."""

import contextlib
import dataclasses
import enum
import sys
import types
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

from megatron_moe_lpr.checkpoint.untrusted.fp8_recipes import RECIPE_MODULE


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    E4M3 = _FormatHelper(448, 448)
    HYBRID = _FormatHelper(448, 57344)


@dataclasses.dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0


class Recipe:
    pass


@dataclasses.dataclass
class DelayedScaling(Recipe):
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024

    def __post_init__(self) -> None:
        if type(self.margin) is not int or not isinstance(self.fp8_format, Format):
            raise ValueError("as pydantic refuses it")
        self.derived = QParams()


CLASSES = (_FormatHelper, Format, QParams, Recipe, DelayedScaling)
for _class in CLASSES:
    _class.__module__ = RECIPE_MODULE


@contextlib.contextmanager
def stand_in() -> Iterator[types.ModuleType]:
    """Within it the module is imported under its name."""
    parts = RECIPE_MODULE.split(".")
    modules = {name: types.ModuleType(name) for name in (".".join(parts[:end]) for end in range(1, len(parts) + 1))}
    vars(modules[RECIPE_MODULE]).update({one.__name__: one for one in CLASSES})
    with mock.patch.dict(sys.modules, modules):
        yield modules[RECIPE_MODULE]
