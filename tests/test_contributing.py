"""CONTRIBUTING.md: its examples are in the tests, its targets in the Makefile, its table true of megatron-core."""

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests.slowest_first import SLOWEST

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "megatron_moe_lpr"
CODE = re.compile(r"`([^`\n]+)`")
EXAMPLE = re.compile(r"From\s`(tests/\S+\.py)`:\n\n```python\n(.*?)```", re.DOTALL)


def rows() -> list[tuple[list[str], list[str]]]:
    """Return for each row of the table our files, and Megatron-Core's files with the names that follow them."""
    cells = [re.split(r" ?\| ?", line) for line in PAGE.splitlines() if line.startswith("| `") and ".py`" in line]
    return [(CODE.findall(cell[1]), CODE.findall(cell[2])) for cell in cells]


def expected() -> set[tuple[str, str]]:
    """Return (file, name) of everything in Megatron-Core that the table names."""
    found, path = set(), ""
    for _, words in rows():
        for word in words:
            if word.endswith(".py"):
                path = word
            else:
                found.add((path, word))
    return found


def is_in_megatron(path: str, name: str) -> bool:
    file = Path(importlib.util.find_spec("megatron.core").origin).parent / path
    return (
        file.is_file() and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", file.read_text(encoding="utf-8")) is not None
    )


@pytest.mark.parametrize(("path", "name"), sorted(expected()))
def test_what_is_depended_on_is_there(path, name):
    assert is_in_megatron(path, name)


def version_rows() -> list[tuple[str, str, str]]:
    """Versions as packaging writes them, file and name of each row of what only some versions have."""
    rows = re.findall(r"^\| ([<>=]\S+) \| `\S+` \| `(\S+)` `(\S+)` \|", PAGE, re.MULTILINE)
    assert len(rows) > 5
    return rows


@pytest.mark.parametrize(("versions", "path", "name"), version_rows())
def test_what_only_some_versions_have_is_there_in_those(versions, path, name):
    assert is_in_megatron(path, name) == SpecifierSet(versions).contains(metadata.version("megatron-core"))


def hangs_on_internals(tree: ast.Module) -> bool:
    """Return whether a file imports private names of Megatron-Core, extends its classes or replaces names in it."""
    imported = set(_imported(tree))
    if any(name.startswith("_") for name in imported):
        return True
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(_root(base) in imported for base in node.bases):
            return True
        is_megatron = isinstance(node, ast.Attribute) and _root(node.value) in imported
        if is_megatron and (isinstance(node.ctx, ast.Store) or re.match("_[^_]", node.attr)):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "megatron_moe_lpr.megatron.overriding":
            return True
        if isinstance(node, ast.Call) and _root(node.func) == "setattr" and _root(node.args[0]) in imported:
            return True
    return False


def _imported(tree: ast.Module) -> Iterator[str]:
    """Yield the local names of everything imported from Megatron-Core."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.core"):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.asname for alias in node.names if alias.asname and alias.name.startswith("megatron.core"))


def _root(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def needing_a_row() -> set[str]:
    """Return files of the package that an upgrade of Megatron-Core may break without an error."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        mirrors = re.search(r"[Mm]irrors .*(megatron-core|\.py `)", text)
        replaces = path.parent.name == "cpu" and "\ndef install(" in text and path.name != "__init__.py"
        if mirrors or replaces or hangs_on_internals(ast.parse(text)):
            found.add(str(path.relative_to(PACKAGE)))
    return found


def test_every_file_that_hangs_on_internals_has_a_row():
    listed = {path for files, _ in rows() for path in files}
    assert not {path for path in listed if not (PACKAGE / path).is_file()}
    found = needing_a_row()
    assert sorted(found - listed) == [] and "model/moe/router.py" in found


@pytest.mark.parametrize(
    ("source", "hangs"),
    [
        ("from megatron.core.a import _b", True),
        ("from megatron.core.a import B\nclass C(B): ...", True),
        ("from megatron.core import a\nclass C(a.B): ...", True),
        ("import megatron.core.a as a\na.b, a.c = 1, 2", True),
        ("from megatron.core.a import B\nB.forward = len", True),
        ("from megatron.core import a\nprint(a._b)", True),
        ("from megatron.core import a\nsetattr(a, name, value)", True),
        ("from megatron_moe_lpr.megatron.overriding import replace\nreplace(a, b=c)", True),
        ("from megatron.core import a\nfrom torch import _b\nclass C(D): ...\na.b(c._d)", False),
    ],
)
def test_what_hanging_on_internals_is(source, hangs):
    assert hangs_on_internals(ast.parse(source)) is hangs


@pytest.mark.parametrize(("path", "example"), EXAMPLE.findall(PAGE))
def test_an_example_is_a_test_of_this_repository(path, example):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert all(part.strip() in text for part in example.split("\n\n\n"))


def targets() -> set[str]:
    """Return the targets that `make help` lists."""
    command = ["make", "--no-print-directory", "help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    return {line.split()[1] for line in shown.splitlines()}


def test_targets_and_paths_exist():
    assert set(re.findall(r"(?:`|^|&& )make ([a-z][\w-]*)", PAGE, re.MULTILINE)) <= targets()
    named = [word for text in re.findall(r'TESTS="?([^"`\n]+)', PAGE) for word in text.split(" -k ")[0].split()]
    text = re.sub(r"^\|.*", "", PAGE, flags=re.MULTILINE)
    named += [word for word in CODE.findall(text) if re.fullmatch(r"(tests|megatron_moe_lpr|docs|\.ci)/\S*", word)]
    assert len(named) > 10 and not [path for path in named if not (ROOT / path).exists()]


def test_the_slowest_files_are_those_that_start_first():
    assert tuple(re.findall(r"\| `(tests/\S+\.py)` \|$", PAGE, re.MULTILINE)) == SLOWEST
    assert all((ROOT / path).is_file() for path in SLOWEST)
