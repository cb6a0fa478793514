"""No identifier begins with `of_`: `grad_input` and `layer_kinds` are what authors of torch write."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("megatron_moe_lpr", "tools", "tests", "benchmarks", "examples")
NAME_FIELDS = ("name", "id", "arg", "attr", "asname")
"""Fields of syntax nodes that hold an identifier."""


def genitives(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and identifier of each name that begins with `of_`, with or without underscores before."""
    for node in ast.walk(ast.parse(source)):
        for field in NAME_FIELDS:
            name = getattr(node, field, None)
            if isinstance(name, str) and re.match("_*of_", name, re.IGNORECASE):
                yield getattr(node, "lineno", 0), name


def test_no_name_is_a_genitive():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in genitives(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    ["def of_layer(): ...", "def f(of_input): ...", "_of_rank = 1", "x.of_up", "f(of_weight=1)", "OF_THE_BASE = 1"],
)
def test_a_genitive_is_found_wherever_it_is(source):
    assert list(genitives(source))


def test_other_names_are_left():
    assert not list(genitives("import a.of_b as c\noffset = number_of_layers = x['of_layer']"))
