"""Imports run one way: between rooms downwards in the order of docs/architecture.md, between modules in no circle.

Looked at in the source, so that imports within functions, for type checkers alone and by `python -m` count too.
"""

import ast
import functools
import graphlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_moe_lpr"
OUTSIDE = ("tests", "benchmarks", "examples", "setup")
"""What neither the package nor the tools may import."""
DEVICES = re.compile(r"(cuda|gloo|nccl)(:\d*)?")
"""Names of devices and backends, as texts. Megatron's names that contain them (`cuda_graph_scope`) are others."""
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

Sources = Mapping[PurePosixPath, str]
"""Text of each file of the package and the tools, by its path in the repository."""


def read_sources() -> Sources:
    paths = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    return {PurePosixPath(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


@functools.cache
def rooms() -> dict[str, int]:
    """Height of each room of the page, the top one's first: equal for rooms that stand beside each other."""
    block = re.search(r"^```\n(tools/.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    heights: dict[str, int] = {}
    for number, line in enumerate(block[1].splitlines()):
        match = re.match(r"( +)?(\+ )?(\S+)(  |$)", line)
        if match[3] != f"{PACKAGE}/":
            height = min(heights.values()) if match[2] else -number
            heights[f"{PACKAGE}/{match[3]}" if match[1] else match[3]] = height
    return heights


def room_of(path: PurePosixPath) -> str:
    """As the page calls it: of a file in the package's own directory the file, or `*.py` for the rest of them."""
    if path.parent == PurePosixPath(PACKAGE):
        return str(path) if str(path) in rooms() else f"{PACKAGE}/*.py"
    return f"{path.parent}/"


def module_of(path: PurePosixPath) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


parse = functools.cache(ast.parse)


FACADE = (PurePosixPath(f"{PACKAGE}/__init__.py"), f"{PACKAGE}.api")
"""The package's top offers the Python API, which it imports when a name of it is asked for."""


def imports(path: PurePosixPath, sources: Sources) -> set[str]:
    """Modules of this repository that a file names in an import or, whole, in a text, as for `python -m`."""
    found = _imports(path, sources[path], frozenset(map(module_of, sources)))
    return found - {FACADE[1]} if path == FACADE[0] else found


@functools.cache
def _imports(path: PurePosixPath, source: str, modules: frozenset[str]) -> set[str]:
    package = path.parent.parts
    found: set[str] = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else base for name in names}
        elif isinstance(node, ast.Constant) and node.value in modules - {PACKAGE}:
            found.add(node.value)
    return {name for name in found if name in modules or name.split(".")[0] in OUTSIDE} - {module_of(path)}


def upward(sources: Sources) -> list[str]:
    """Imports that do not run down, `FILE imports MODULE` each."""
    heights, files = rooms(), {module_of(path): path for path in sources}
    found = []
    for path in sources:
        own = room_of(path)
        for name in imports(path, sources):
            other = room_of(files[name]) if name in files else None
            if other is None or (other != own and heights[other] >= heights[own]):
                found.append(f"{path} imports {name}")
    return sorted(found)


def circle(sources: Sources) -> list[str]:
    """Modules that import each other in a ring, one ring of them; empty: there is none."""
    graph = {module_of(path): imports(path, sources) for path in sources}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def naming_a_device(source: str) -> Iterator[str]:
    """Lines of code that reach for `torch.cuda` or `.cuda()`, or name CUDA, NCCL or gloo as a text of its own."""
    for node in ast.walk(parse(source)):
        attribute = isinstance(node, ast.Attribute) and (
            node.attr == "is_cuda" or (node.attr == "cuda" and ast.unparse(node.value) == "torch")
        )
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
        text = isinstance(node, ast.Constant) and isinstance(node.value, str) and DEVICES.fullmatch(node.value)
        plain = isinstance(node, ast.Import) and any(alias.name.startswith("torch.cuda") for alias in node.names)
        parts = isinstance(node, ast.ImportFrom) and (
            (node.module or "").startswith("torch.cuda")
            or (node.module == "torch" and any(alias.name == "cuda" for alias in node.names))
        )
        if attribute or called or text or plain or parts:
            yield f"line {node.lineno}: {ast.unparse(node)}"


def outside_platform(sources: Sources) -> list[str]:
    """Where another room than the platform's names a device."""
    return [
        f"{path} {line}"
        for path, source in sources.items()
        if not path.is_relative_to(f"{PACKAGE}/platform")
        for line in naming_a_device(source)
    ]


@pytest.fixture(scope="module")
def sources():
    return read_sources()


def planted(sources: Sources, path: str, code: str) -> Sources:
    """The same files, with a function more at the end of one."""
    place = PurePosixPath(path)
    return {**sources, place: f"{sources[place]}\n\ndef planted():\n    {code}\n"}


def test_the_page_names_every_room_and_no_other(sources):
    assert {room_of(path) for path in sources} == set(rooms())
    directories = {f"{path.relative_to(ROOT)}/" for path in (ROOT / PACKAGE).rglob("*") if any(path.glob("*.py"))}
    assert directories <= set(rooms()) and len(directories) > 20


def test_the_page_names_what_is_there(sources):
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    files = [f"/{path}" for path in (*sources, *(path.relative_to(ROOT) for path in (*tests, Path(__file__))))]
    text = "\n".join((*sources.values(), *(path.read_text(encoding="utf-8") for path in tests)))
    words = set(re.findall(r"`([^`\s]+)`", PAGE.replace("\n```\n", "\n")))
    paths = {word for word in words if word.endswith(".py")}
    assert len(paths) > 30 and not [path for path in paths if not any(file.endswith(f"/{path}") for file in files)]
    names = {word for word in words if re.fullmatch(r"[A-Za-z_]\w+", word)}
    assert len(names) > 30 and not [name for name in names if not re.search(rf"\b{name}\b", text)]


def test_imports_run_down(sources):
    assert upward(sources) == []


def test_modules_import_each_other_in_no_circle(sources):
    assert circle(sources) == []


def test_platform_alone_names_devices(sources):
    assert outside_platform(sources) == []


@pytest.mark.parametrize(
    ("path", "code", "name"),
    [
        ("data/indexed.py", "from megatron_moe_lpr.training.loop import Trainer", "training.loop"),
        ("data/indexed.py", "from megatron_moe_lpr.training import loop", "training.loop"),
        ("data/indexed.py", "import megatron_moe_lpr.training.loop as loop", "training.loop"),
        ("data/indexed.py", "from ..training import loop", "training.loop"),
        ("data/indexed.py", "run(['-m', 'megatron_moe_lpr.pretrain'])", "pretrain"),
        ("errors.py", "from megatron_moe_lpr.platform import select_platform", "platform"),
        ("training/loop.py", "from megatron_moe_lpr.pretrain import main", "pretrain"),
        # Rooms that stand beside each other.
        ("data/reading/blend.py", "from megatron_moe_lpr.data.preparation import merging", "data.preparation.merging"),
        ("planning/memory.py", "from megatron_moe_lpr.evaluation import losses", "evaluation.losses"),
    ],
)
def test_an_import_upwards_is_found(path, code, name, sources):
    expected = [f"{PACKAGE}/{path} imports {PACKAGE}.{name}"]
    assert upward(planted(sources, f"{PACKAGE}/{path}", code)) == expected


@pytest.mark.parametrize("name", ["tools.convert_hf", "tests.distributed", "benchmarks.communication"])
def test_the_package_imports_nothing_around_it(name, sources):
    path = f"{PACKAGE}/training/loop.py"
    assert upward(planted(sources, path, f"import {name}")) == [f"{path} imports {name}"]


def test_what_imports_training(sources):
    """By the order alone; said once more, since nothing but a command, or a rehearsal of training, may."""
    importing = {
        room_of(path)
        for path in sources
        if any(name.startswith(f"{PACKAGE}.training") for name in imports(path, sources))
    }
    assert {room for room in importing if not room.startswith(f"{PACKAGE}/training/")} == {
        f"{PACKAGE}/commands/",
        f"{PACKAGE}/rehearsal/",
        *(f"{PACKAGE}/{name}.py" for name in ("api", "launch", "pretrain")),
    }


def test_a_circle_is_found(sources):
    found = circle(
        planted(sources, f"{PACKAGE}/planning/activations.py", "from megatron_moe_lpr.planning import memory")
    )
    assert {f"{PACKAGE}.planning.activations", f"{PACKAGE}.planning.memory"} <= set(found)


@pytest.mark.parametrize(
    "code",
    [
        "torch.cuda.synchronize()",
        "from torch import cuda",
        "from torch.cuda import Stream",
        "import torch.cuda as device",
        "tensor.to('cuda:0')",
        "tensor.cuda()",
        "init('gloo')",
        "init(backend='nccl')",
        "f(f'cuda:{rank}')",
    ],
)
def test_a_device_named_elsewhere_is_found(code, sources):
    found = outside_platform(planted(sources, f"{PACKAGE}/model/moe/router.py", code))
    assert found and all(line.startswith(f"{PACKAGE}/model/moe/router.py line ") for line in found)
