"""The tables of the extension: against Transformer Engine's own calls of it, and how they are read from C++."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulation import extension
from tests.emulation.differences import changes, differences, markdown
from tests.emulation.kernels import UNFIT
from tests.emulation.table import TABLE, VERSIONS, Signature, read
from tests.emulation.test_extension import sources
from tests.emulation.write_table import table

ROOT = Path(__file__).parents[2]
# Of a file for ONNX; Transformer Engine's extension has no such name in any version.
NEVER_THERE = {"LayerNorm"}
CALLS = {"2.11.0": 110, "2.17.1": 175, "2.20.2": 205}


def uses() -> Iterator[tuple[str, ast.expr, ast.Call | None]]:
    """Every `tex.name` in Transformer Engine's Python part, with the call where it is one."""
    for path in sorted(sources().rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        called = {id(node.func): node for node in nodes if isinstance(node, ast.Call)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tex":
                yield f"{path.name}:{node.lineno} {node.attr}", node, called.get(id(node))


def misfit(call: ast.Call, signature: Signature) -> bool:
    """Whether the extension would refuse the number or the names of a call's arguments."""
    named = [keyword.arg for keyword in call.keywords]
    given = [argument.name for argument in signature[: len(call.args)]] + named
    needed = {argument.name for argument in signature if not argument.optional}
    by_position = bool(named) and any(argument.positional_only for argument in signature)
    wrong = set(given) - {argument.name for argument in signature} or needed - set(given)
    return len(call.args) > len(signature) or len(set(given)) < len(given) or bool(wrong) or by_position


def test_transformer_engine_s_own_calls_fit_the_table():
    """Of all functions, emulated or not: what was read from C++ is what Python calls."""
    checked = 0
    for place, node, call in uses():
        assert node.attr in TABLE.names | NEVER_THERE, place
        spread = call is not None and any(isinstance(part, ast.Starred) for part in call.args)
        spread = spread or (call is not None and any(keyword.arg is None for keyword in call.keywords))
        if call is not None and not spread and node.attr in TABLE.functions:
            assert not misfit(call, TABLE.functions[node.attr]), place
            checked += 1
    assert checked >= CALLS[TABLE.version]


def test_the_extension_has_the_table_s_names_alone(tex):
    """A name of another version is an AttributeError, as it would be there."""
    assert TABLE.names <= vars(tex).keys()
    others = {name for version in VERSIONS for name in read(version).names} - TABLE.names
    for name in others | {"of_no_version"}:
        with pytest.raises(AttributeError):
            getattr(tex, name)


def test_an_unknown_version_is_refused(monkeypatch):
    monkeypatch.setattr(extension, "is_installed", lambda: False)
    monkeypatch.setattr(extension, "version", lambda: "2.99.0")
    with pytest.raises(RuntimeError, match=r"no table of Transformer Engine 2\.99\.0's extension, only of 2\.11\.0, "):
        extension.install()


def test_other_arguments_than_the_emulated_ones_are_refused(monkeypatch):
    """A function whose arguments changed is not called with the old ones."""
    monkeypatch.setattr(extension, "is_installed", lambda: False)
    monkeypatch.setattr(extension, "without_a_fit", lambda: ["rmsnorm_fwd"])
    with pytest.raises(RuntimeError, match="has other arguments for rmsnorm_fwd"):
        extension.install()


def test_functions_for_other_versions_fit_those():
    """Each form of an emulated function is that of some version."""
    for name, functions in UNFIT.items():
        for function in functions:
            code = function.__code__
            given = list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
            known = [[part.name for part in read(version).functions.get(name, ())] for version in VERSIONS]
            assert given in known, function.__qualname__


def test_differences_of_two_tables():
    old, new = read("2.11.0"), read("2.20.2")
    kinds = {name: kind for name, kind, _ in differences(old, new)}
    assert kinds["group_quantize"] == "new" and kinds["fused_attn_fwd"] == "changed" and "rmsnorm_fwd" not in kinds
    assert changes(old, new, "fused_attn_fwd") == "+o_format +qkv_scale_inv_format +bottom_right_diagonal"
    assert changes(old, new, "NVTE_Fused_Attn_Backend") == "-NVTE_F16_max512_seqlen"
    assert {kind for _, kind, _ in differences(new, old)} == {"gone", "changed"}


def test_the_document_shows_the_differences():
    assert markdown(read(VERSIONS[0]), read(VERSIONS[-1])) in (ROOT / "docs/gpu.md").read_text()


PYBIND = """
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {  // a comment, with a comma
  NVTE_DECLARE_COMMON_PYBIND11_HANDLES(m)
  m.def("named", &transformer_engine::pytorch::named_cuda, "What, it (does)", py::arg("tensor"),
        py::arg("scale") = 0.5f, py::kw_only(), py::arg("out") = py::none());
  m.def("by_position", &transformer_engine::pytorch::by_position, "", py::call_guard<py::gil_scoped_release>());
  m.def("nothing", &transformer_engine::pytorch::nothing);
  py::class_<transformer_engine::pytorch::Meta>(m, "Meta").def("method", &Meta::method, py::arg("a"));
}
"""
HEADER = """
at::Tensor named_cuda(const at::Tensor &tensor, float scale, std::optional<at::Tensor> out = std::nullopt);
/* int by_position(int never); */
std::vector<py::object> by_position(std::vector<std::vector<at::Tensor>> lists, const DType type,
                                    c10::optional<int64_t> count_, MaybeTensor bias);
void nothing();
enum class DType { kByte = 0, kInt32 = 2, kNext, kLast = kNext };
"""
HANDLES = """
#define NVTE_DECLARE_COMMON_PYBIND11_HANDLES(m) \\
  pybind11::enum_<transformer_engine::DType>(m, "DType", pybind11::module_local()) \\
      .value("kByte", transformer_engine::DType::kByte).value("kNext", transformer_engine::DType::kNext);
"""
EXPECTED = [
    "by_position(lists: list[list[Tensor]], type: DType, count: int | None, bias: Tensor | None, /)",
    "class Meta",
    "enum DType: kByte=0 kNext=3",
    "named(tensor: Tensor, scale: float = 0.5, *, out: Tensor | None = None)",
    "nothing()",
]


def test_tables_are_read_from_c_plus_plus(tmp_path):
    for name, text in (
        ("csrc/extensions/pybind.cpp", PYBIND),
        ("csrc/extensions.h", HEADER),
        ("common_headers/common/util/pybind_helper.h", HANDLES),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert table(tmp_path) == EXPECTED
