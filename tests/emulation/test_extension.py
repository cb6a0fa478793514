"""The emulated extension as a whole: what it has, who calls it, and that everything else is refused by name.

`make test-te TESTS="tests/emulation/test_extension.py -s"` prints the emulated functions.
"""

import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from tests.emulation import extension, kernels
from tests.emulation.builders import call
from tests.emulation.kernels import CALLERS, FUNCTIONS, KernelRefuses
from tests.emulation.permutation import TRITON, TRITON_MODULE
from tests.emulation.table import ENUMERATIONS, TABLE, check_for

HERE = Path(__file__).parent


def sources() -> Path:
    import transformer_engine.pytorch

    return Path(transformer_engine.pytorch.__file__).parent


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transformer_engine_calls_it_where_we_say(name):
    """In the first file that is named beside the function."""
    file = CALLERS[name].replace(":", " ").replace(",", " ").split()[0]
    assert name in (sources() / file).read_text()


def test_every_function_is_tested_here():
    tests = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    stem = {name.removesuffix("_forward").removesuffix("_backward") for name in FUNCTIONS}
    assert [name for name in stem | TRITON.keys() if name not in tests] == []


def test_the_list_of_functions():
    """Printed, with the place that calls each."""
    table = Table("function", "called by, below transformer_engine/pytorch", title="emulated functions")
    for name, caller in sorted(CALLERS.items()):
        table.add_row(name, caller)
    for name in TRITON:
        table.add_row(f"{name} (Triton)", "permutation.py")
    Console(width=140).print(table)
    assert table.row_count == len(FUNCTIONS) + len(TRITON)


def test_what_is_not_emulated_raises_with_its_name(tex):
    """It may be named and put into tables, as modules do at import; never called."""
    with pytest.raises(KernelRefuses, match=r"transformer_engine_torch\.gelu\(Tensor\(2, 3\), None\) is a CUDA kernel"):
        tex.gelu(torch.ones(2, 3), None)
    with pytest.raises(KernelRefuses, match=r"mxfp8_scaling_partial_cast\(rows=4\) is a CUDA kernel that is not emul"):
        tex.mxfp8_scaling_partial_cast(rows=4)
    with pytest.raises(KernelRefuses, match=r"transformer_engine_torch\.CommOverlapHelper\.of\(\)"):
        tex.CommOverlapHelper.of()
    with pytest.raises(AttributeError):
        tex.__file__  # noqa: B018


def a_value(kind: str):
    """Some value that pybind11 converts to a type of the table."""
    values = {"Tensor": torch.zeros(1), "int": 1, "float": 1.0, "bool": True, "str": "", "object": None}
    values |= {"torch.dtype": torch.uint8, "torch.device": torch.device("cpu"), "torch.Generator": torch.Generator()}
    values |= {name: next(iter(members)) for name, members in ENUMERATIONS.items()}
    if kind.endswith("| None") or kind in TABLE.classes:
        return None
    return [a_value(kind[5:-1])] if kind.startswith("list[") else values[kind]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_argument_of_a_wrong_type_is_refused(name):
    """Each in turn, among others that fit; what the real extension takes as an object it looks into itself."""
    signature = TABLE.functions[name]
    fitting = {argument.name: a_value(argument.type) for argument in signature}
    for argument in signature:
        if argument.type != "object":
            with pytest.raises(TypeError, match=rf"^{name}: {argument.name} is "):
                call(name, **(fitting | {argument.name: object()}))


def test_arguments_are_converted_as_pybind11_does():
    """None is False, an integer is a float, a float is no integer; a format is its number in newer versions."""
    taken = {"bool": (None, 1, False), "float": (1, 0.5, True), "int": (1, True), "Tensor | None": (None,)}
    taken["list[int]"] = ([1, 2], (1,), [])
    refused = {"bool": ("", []), "float": ("1", None), "int": (1.0, None, "1"), "Tensor": (None, 1), "str": (1,)}
    refused |= {"list[int]": ([1.0], None, "12"), "torch.dtype": ("float32",), "NVTE_Mask_Type": (0, None)}
    number = 7
    (taken if TABLE.at_least("2.17") else refused)["DType"] = (number,)
    for expected, cases in ((True, taken), (False, refused)):
        for kind, values in cases.items():
            assert [check_for(kind)(value) for value in values] == [expected] * len(values), kind


def test_arguments_by_position_are_not_taken_by_name():
    """As of functions that are bound without names."""
    tensor = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"multi_tensor_scale: .* is given by position alone"):
        FUNCTIONS["multi_tensor_scale"](chunk_size=1, noop_flag=tensor, tensor_lists=[[], []], scale=1.0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_unknown_and_missing_arguments_are_refused(name):
    with pytest.raises(TypeError, match="an_unknown_argument"):
        FUNCTIONS[name](an_unknown_argument=1)
    with pytest.raises(TypeError, match="missing"):
        FUNCTIONS[name]()


def test_kernels_do_not_reach_the_host(tex, monkeypatch):
    """With --platform cpu on a machine that has Transformer Engine."""
    host = types.SimpleNamespace(_selected=types.SimpleNamespace(name="cpu"))
    monkeypatch.setitem(sys.modules, "megatron_moe_lpr.platform", host)
    with pytest.raises(KernelRefuses, match="swiglu: a CUDA kernel was called with tensors of --platform cpu"):
        tex.swiglu(torch.ones(2, 4), None)
    host._selected.name = "cuda"
    assert tex.swiglu(torch.ones(2, 4), None).shape == (2, 2)


def test_calls_are_counted(tex):
    before = kernels.CALLS.get("swiglu", 0)
    tex.swiglu(torch.ones(2, 4), None)
    assert kernels.CALLS["swiglu"] == before + 1


def test_triton_s_kernels_are_replaced_where_they_are_looked_for():
    module = sys.modules[TRITON_MODULE]
    assert all(getattr(module, name).__wrapped__ in candidates for name, candidates in TRITON.items())


def test_the_real_library_is_never_replaced(monkeypatch):
    """Where the compiled extension is installed the emulation is not available."""
    assert extension.is_available()
    monkeypatch.setattr(extension, "_installed", lambda package: True)
    assert not extension.is_available()
