"""What replaces Megatron's code is there to be replaced, and nothing is set past that check."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_moe_lpr
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.megatron.overriding import CHECKED, override, overrides_megatron, replace, supply

PACKAGE = Path(megatron_moe_lpr.__file__).parent
OTHERS = ("megatron.core", "torch.distributed.checkpoint")
"""Packages whose classes are extended and whose attributes are replaced by names that their next version may change."""


def ours(name: str, bases: tuple[type, ...] = (object,), **content: object) -> type:
    """A class that stands in this package, where the others stand outside of it."""
    return type(name, bases, {"__module__": "megatron_moe_lpr.example", **content})


class Theirs:
    def step(self) -> None: ...


def test_an_attribute_that_is_not_there_is_not_set():
    owner = types.SimpleNamespace(new_name=1)
    with pytest.raises(UserError, match=r"megatron-core \d.*SimpleNamespace has no old_name, which"):
        replace(owner, old_name=2)
    assert vars(owner) == {"new_name": 1}
    replace(owner, new_name=2)
    assert owner.new_name == 2


def test_a_name_that_a_module_does_not_use_is_not_supplied(monkeypatch):
    module = importlib.import_module("tests.megatron")
    with pytest.raises(UserError, match=r"tests\.megatron has no Missing, which"):
        supply(module, Missing=1)
    assert not hasattr(module, "Missing")
    monkeypatch.setattr(inspect, "getsource", lambda owner: "def f():\n    return Missing")
    supply(module, Missing=1)
    assert module.Missing == 1


def test_a_method_that_overrides_nothing_is_refused():
    def step(self) -> None: ...

    assert overrides_megatron(ours("Good", (Theirs,), step=override(step)))
    with pytest.raises(UserError, match=r"has no steps, which megatron_moe_lpr\.example\.Bad replaces"):
        overrides_megatron(ours("Bad", (Theirs,), steps=override(step)))


def test_a_method_that_overrides_by_accident_is_refused():
    def step(self) -> None: ...

    with pytest.raises(UserError, match=r"Theirs has a step, and megatron_moe_lpr\.example\.Bad another"):
        overrides_megatron(ours("Bad", (Theirs,), step=step))


def test_methods_of_a_mixin_are_checked_where_it_is_mixed_in():
    def step(self) -> None: ...

    mixin = ours("Mixin", step=override(step))
    assert overrides_megatron(ours("Good", (mixin, Theirs)))
    with pytest.raises(UserError, match="has no step"):
        overrides_megatron(ours("Bad", (mixin, types.SimpleNamespace)))


def test_a_field_of_the_base_is_not_defined_again():
    base = dataclasses.make_dataclass("Base", [("size", int)])
    good, bad = (dataclasses.make_dataclass(name, [(name, int, 0)], bases=(base,)) for name in ("number", "size"))
    for kind in (good, bad):
        kind.__module__ = "megatron_moe_lpr.example"
    assert overrides_megatron(good)
    with pytest.raises(UserError, match="has a size"):
        overrides_megatron(bad)


def import_all() -> None:
    """Every module, so that every class is defined."""
    for module in pkgutil.walk_packages([str(PACKAGE)], "megatron_moe_lpr."):
        if not module.name.endswith(("writer_process", "__main__")):
            importlib.import_module(module.name)


def overridden() -> Iterator[tuple[type, str]]:
    import_all()
    for kind in CHECKED:
        if kind.__module__.startswith("megatron_moe_lpr.") and kind.__module__ != "megatron_moe_lpr.example":
            yield from ((kind, name) for name, value in vars(kind).items() if getattr(value, "__override__", False))


def test_a_planted_rename_of_each_overridden_method_fails_loudly(monkeypatch, cpu_platform):
    found = list(overridden())
    for kind, name in found:
        with monkeypatch.context() as renamed:
            for base in kind.__mro__[1:]:
                if name in vars(base) and not base.__module__.startswith("megatron_moe_lpr"):
                    if base is object:
                        continue
                    renamed.setattr(base, f"{name}_of_the_next_version", vars(base)[name], raising=False)
                    renamed.delattr(base, name)
            with pytest.raises(
                UserError, match=re.escape(f"has no {name}, which {kind.__module__}.{kind.__qualname__} replaces")
            ):
                overrides_megatron(kind)
        overrides_megatron(kind)
    names = {f"{kind.__name__}.{name}" for kind, name in found}
    assert {"LPRRouter.gating", "CallsQueue._get_async_caller", "BackgroundWriter.close"} <= names
    assert len(found) > 20


def imported(tree: ast.Module) -> set[str]:
    """Local names of what comes from the other packages."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OTHERS):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.asname for alias in node.names if alias.asname and alias.name.startswith(OTHERS)}
    return found


def root(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def unchecked(source: str) -> list[int]:
    """Lines that extend a class or set an attribute of the others past the check."""
    tree = ast.parse(source)
    names, lines = imported(tree), []
    for node in ast.walk(tree):
        extends = isinstance(node, ast.ClassDef) and any(root(base) in names for base in node.bases)
        unmarked = extends and "overrides_megatron" not in {root(one) for one in node.decorator_list}
        stores = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and root(node.value) in names
        is_call = isinstance(node, ast.Call) and root(node.func) == "setattr" and root(node.args[0]) in names
        if unmarked or stores or is_call:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_set_past_the_check(path):
    assert unchecked(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("from megatron.core.a import B\nclass C(B): ...", [2]),
        ("from megatron.core.a import B\n@overrides_megatron\nclass C(B): ...", []),
        ("import torch.distributed.checkpoint.a as a\nclass C(a.B): ...", [2]),
        ("import megatron.core.a as a\na.b = 1", [2]),
        ("from megatron.core.a import B\nB.forward, x = len, 1", [2]),
        ("from megatron.core import a\nsetattr(a, name, 1)", [2]),
        ("from megatron.core import a\nreplace(a, b=1)\na.b()\nx.a = a.b", []),
    ],
)
def test_what_goes_past_it(source, lines):
    assert unchecked(source) == lines
