"""constraints.txt pins every requirement of setup.py within its range."""

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
INSTALLED_BY_CI = ("", "test", "eval")


def pins() -> dict[str, list[Requirement]]:
    """Return the pins by package; some packages have one for each Python version."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def wanted() -> list[Requirement]:
    """Return the requirements in the package's metadata that apply to the environments of CI."""
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
