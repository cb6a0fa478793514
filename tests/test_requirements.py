"""constraints.txt pins what setup.py asks for, within its ranges; setup.py alone says what that is."""

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
INSTALLED_BY_CI = ("", "test", "eval")


def pins() -> dict[str, list[Requirement]]:
    """By package; some are pinned for each Python apart."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def wanted() -> list[Requirement]:
    """What the package's metadata, made by setup.py, asks for in the environments that CI makes."""
    needs = map(Requirement, metadata.requires("megatron-moe-lpr"))
    return [
        need for need in needs if any(not need.marker or need.marker.evaluate({"extra": e}) for e in INSTALLED_BY_CI)
    ]


@pytest.mark.parametrize("need", wanted(), ids=str)
def test_a_requirement_is_pinned_within_its_range(need):
    for pin in pins()[canonicalize_name(need.name)]:
        (exact,) = pin.specifier
        assert exact.operator == "==" and need.specifier.contains(exact.version)


def test_what_is_compared():
    names = {need.name for need in wanted()}
    assert {"torch", "megatron-core", "pytest", "lm-eval"} <= names and "transformer-engine" not in names
