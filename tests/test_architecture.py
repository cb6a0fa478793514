"""docs/architecture.md: what its table of places names is there, and its glossary has one line a word."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_moe_lpr"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Text of a section of the page."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def places() -> list[tuple[str, str]]:
    """(file, name in it) of each row of the table; the name is empty where a row gives the file alone."""
    found = re.findall(r"`([\w/]+\.py)`(?: `(\w+)`)?", section("Where to find"))
    return [(file, name) for file, name in found if file]


@pytest.mark.parametrize(("file", "name"), places())
def test_a_place_is_there(file, name):
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    targets = [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    targets += [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert not name or name in defined | {target.id for target in targets if isinstance(target, ast.Name)}


def test_the_glossary_explains_each_word_once():
    words = [word.strip() for row in re.findall(r"^\| (.+?) \|", section("Glossary"), re.M) for word in row.split(",")]
    assert len(words) == len(set(words))
