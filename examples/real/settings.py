"""The settings of `make real`: a YAML file, of which environment variables replace single values."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_moe_lpr.errors import UserError

FILE = Path(__file__).with_name("settings.yaml")
PATHS = ("runs", "corpus", "text", "pairs")
FROM_ENVIRONMENT = {
    **dict.fromkeys(("base", "runs", "text", "pairs", "precision"), str),
    **dict.fromkeys(("ranks", "threads", "seed", "characters"), int),
}
QUICK_ITERS = 3
Flags = Mapping[str, Any]
"""Values of flags, by the flags' names with underscores."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which layers have experts, for a model of any depth."""

    dense_below: float
    """Share of the layers, from the first one on, that stays dense."""
    distance: int
    """Of the other layers every so-manieth has experts, the last one of all among them if the numbers allow it."""
    num_experts: int
    """Experts of such a layer, the original one included."""

    def frequency(self, layers: int) -> str:
        """Return the value of --moe-layer-freq: a list with a 1 for each layer with experts."""
        first = int(self.dense_below * layers)
        ones = [int(layer >= first and (layer - first + 1) % self.distance == 0) for layer in range(layers)]
        return str(ones).replace(" ", "")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of `make real`; settings.yaml explains each of them."""

    runs: Path
    base: str
    corpus: Path
    original: tuple[str, ...]
    expanded: tuple[str, ...]
    text: Path | None
    pairs: Path | None
    seed: int
    ranks: int
    threads: int | None
    precision: str
    new_tokens: int
    characters: int
    replay_share: float
    passage_characters: int
    layouts: dict[str, Layout]
    layout: str
    trial_iters: int
    allocation_tokens: int
    training: Flags
    stage1: Flags
    stage2: Flags
    review_weights: Mapping[str, int]
    full: Flags
    lora: Flags

    @property
    def languages(self) -> tuple[str, ...]:
        """All languages, original ones first."""
        return (*self.original, *self.expanded)

    def hf(self, name: str) -> Path:
        """Return the Hugging Face directory of a model."""
        return self.runs / "hf" / name


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings: `FILE`, what the file that SETTINGS names replaces of it, and what the environment does.

    Of a setting that has values by name, such as `stage1`, the file gives those that differ.

    Raises:
        UserError: the file cannot be read, or a value is unknown or no number.
    """
    file = Path(environment.get("SETTINGS") or FILE)
    values = _read_yaml(FILE)
    for name, value in _read_yaml(file).items():
        both = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if both else value
    for name, kind in FROM_ENVIRONMENT.items():
        if text := environment.get(name.upper()):
            values[name] = _parse(kind, name.upper(), text)
    known = {field.name for field in dataclasses.fields(Settings)}
    if wrong := values.keys() - known:
        raise UserError(f"{file}: unknown: {', '.join(map(str, wrong))}; the settings are those of {FILE}")
    try:
        settings = Settings(**values | _typed(values))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}; see {FILE}") from None
    if settings.layout not in settings.layouts:
        raise UserError(f"{file}: layout: {settings.layout!r} is none of {', '.join(settings.layouts)}")
    return _quick(settings) if environment.get("QUICK", "0") != "0" else settings


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: settings expected, as in {FILE}")
    return values


def _parse(kind: type, name: str, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{name}={text}: {kind.__name__} expected") from None


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that YAML has no type for."""
    return {
        **{name: Path(values[name]) if values[name] else None for name in PATHS},
        **{name: tuple(values[name]) for name in ("original", "expanded")},
        "layouts": {name: Layout(**layout) for name, layout in values["layouts"].items()},
    }


def _quick(settings: Settings) -> Settings:
    """Shorten everything to a few steps, in a directory of its own: does it run to its end?"""
    short = {"lr_warmup_iters": 1}
    return dataclasses.replace(
        settings,
        runs=settings.runs.with_name(f"{settings.runs.name}-quick"),
        characters=1500,
        replay_share=0.5,
        new_tokens=300,
        trial_iters=2,
        allocation_tokens=512,
        training={**settings.training, "seq_length": 128, "log_interval": 1},
        stage1={**settings.stage1, **short},
        stage2={**settings.stage2, **short, "train_iters": QUICK_ITERS},
        full={**settings.full, **short},
        lora={**settings.lora, **short},
    )
