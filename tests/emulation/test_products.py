"""Matrix products against float64, and everything that cuBLASLt or Transformer Engine's C++ would refuse."""

import pytest
import torch

from tests.emulation.builders import E4M3, E5M2, blockwise, call, delayed, tensorwise, values
from tests.emulation.kernels import KernelRefuses
from tests.emulation.names import DType
from tests.emulation.products import TF32
from tests.emulation.table import TABLE

TE_DTYPE = {torch.float32: DType.kFloat32, torch.bfloat16: DType.kBFloat16}
TOKENS, INPUTS, OUTPUTS = 32, 144, 48
# As modules call them: forward, gradient of the input, gradient of the weight; shapes of A and B.
LAYOUTS = {
    "TN": ((OUTPUTS, INPUTS), (TOKENS, INPUTS)),
    "NN": ((OUTPUTS, INPUTS), (TOKENS, OUTPUTS)),
    "NT": ((TOKENS, INPUTS), (TOKENS, OUTPUTS)),
}
RECIPES = {
    "delayed": lambda what: delayed(100.0, E5M2 if what == "gradient" else E4M3),
    "tensorwise": lambda what: tensorwise(E5M2 if what == "gradient" else E4M3),
    "blockwise": lambda what: blockwise(2 if what == "weight" else 1),
}


@pytest.fixture(autouse=True)
def _fp32_products(monkeypatch):
    monkeypatch.setenv(TF32, "0")


def gemm(a, b, layout="TN", **changes):
    """As Transformer Engine's `general_gemm` calls it."""
    fields = {"A": a, "transA": layout[0] == "T", "B": b, "transB": layout[1] == "T", "D": None, "quantizer": None}
    fields |= {"output_dtype": DType.kFloat32, "bias": None, "bias_type": DType.kFloat32, "gelu": False}
    fields |= {"gelu_in": None, "grad": False, "workspace": torch.empty(0), "workspace_size": 0, "accumulate": False}
    return call("generic_gemm", **(fields | {"use_split_accumulator": False} | changes))


def grouped_gemm(a, b, out, layout="TN", m_splits=(), single_output=False, accumulate=False):
    """As Transformer Engine's `general_grouped_gemm` calls it."""
    nothing = [torch.empty(0)] * len(a)
    fields = {"A": a, "transa": layout[0] == "T", "B": b, "transb": layout[1] == "T", "D": out, "m_splits": m_splits}
    fields |= {"D_type": DType.kFloat32, "bias": nothing, "bias_type": DType.kFloat32, "pre_gelu_out": nothing}
    fields |= {"single_output": single_output, "grad": layout != "TN", "workspace": [], "workspaceSize": 0}
    fields |= {"accumulate": accumulate, "use_split_accumulator": False, "math_sm_count": 132}
    return call("te_general_grouped_gemm", **fields)


def product(a: torch.Tensor, b: torch.Tensor, layout: str) -> torch.Tensor:
    """The result in float64 of row-major operands."""
    left, right = a.double(), b.double()
    return (right.t() if layout[1] == "T" else right) @ (left.t() if layout[0] == "T" else left)


def operands(layout: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(shape, dtype=dtype) for shape in LAYOUTS[layout])


def assert_close(found: torch.Tensor, expected: torch.Tensor, steps: float = 2e-6) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error < steps, error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_wide_products(layout, dtype, error):
    a, b = operands(layout, dtype)
    found = gemm(a, b, layout, output_dtype=TE_DTYPE[dtype])[0]
    assert found.dtype == dtype
    assert_close(found, product(a, b, layout), error)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_products_multiply_the_rounded_numbers(recipe, layout, tex):
    """Exactly those: column-wise forms hold, with one scale or square blocks, the same numbers as row-wise ones."""
    a, b = operands(layout)
    kinds = {"TN": ("weight", "input"), "NN": ("weight", "gradient"), "NT": ("input", "gradient")}[layout]
    first, second = (tex.quantize(tensor, RECIPES[recipe](kind)) for tensor, kind in zip((a, b), kinds, strict=True))
    found = gemm(first, second, layout)[0]
    if recipe == "blockwise" and layout == "NT":
        by_column = (tex.quantize(tensor.t().contiguous(), blockwise(1)) for tensor in (a, b))
        expected = product(*(values(part).t() for part in by_column), layout)
    else:
        expected = product(values(first), values(second), layout)
    assert_close(found, expected)
    assert_close(found, product(a, b, layout), 0.1)


def test_leading_dimensions_stay():
    a, b = torch.randn(OUTPUTS, INPUTS), torch.randn(4, 8, INPUTS)
    found = gemm(a, b)[0]
    assert found.shape == (4, 8, OUTPUTS)
    assert_close(found.view(32, OUTPUTS), product(a, b.view(32, INPUTS), "TN"))


def test_bias_forward_and_its_gradient_backward():
    (a, b), bias = operands("TN"), torch.randn(OUTPUTS)
    assert_close(gemm(a, b, bias=bias)[0], product(a, b, "TN") + bias.double())
    a, b = operands("NT")
    found, grad_bias, *_ = gemm(a, b, "NT", bias=bias, grad=True)
    assert_close(found, product(a, b, "NT"))
    assert_close(grad_bias, b.double().sum(0))


def test_results_are_added_to_an_output():
    a, b = operands("NT")
    out = torch.randn(OUTPUTS, INPUTS)
    before = out.double()
    assert gemm(a, b, "NT", D=out, accumulate=True)[0] is out
    assert_close(out, before + product(a, b, "NT"))
    gemm(a, b, "NT", D=out)
    assert_close(out, product(a, b, "NT"))


def test_results_are_quantised(tex):
    a, b = operands("TN", torch.bfloat16)
    found = gemm(a, b, output_dtype=DType.kBFloat16, quantizer=tensorwise())[0]
    wide = gemm(a, b, output_dtype=DType.kBFloat16)[0]
    assert torch.equal(found._data, tex.quantize(wide, tensorwise())._data)


@pytest.mark.parametrize(("override", "expected"), [(None, 1.0), ("1", 1.0), ("0", 1 + 2.0**-12)])
def test_fp32_is_tf32_unless_the_environment_forbids_it(override, expected, monkeypatch):
    monkeypatch.delenv(TF32)
    if override is not None:
        monkeypatch.setenv(TF32, override)
    assert gemm(torch.full((1, 1), 1 + 2.0**-12), torch.ones(1, 1))[0].item() == expected


def test_tf32_rounds_operands_to_ten_bits(monkeypatch):
    monkeypatch.delenv(TF32)
    a, b = operands("TN")
    error = (gemm(a, b)[0].double() - product(a, b, "TN")).norm() / product(a, b, "TN").norm()
    assert 1e-4 < error < 2.0**-11


def test_an_expert_s_product_each():
    rows = [5, 0, 27]
    weights, tokens = [torch.randn(OUTPUTS, INPUTS) for _ in rows], torch.randn(TOKENS, INPUTS)
    out = torch.full((TOKENS, OUTPUTS), torch.nan)
    grouped_gemm(weights, list(tokens.split(rows)), [out], m_splits=rows, single_output=True)
    expected = [product(weight, part, "TN") for weight, part in zip(weights, tokens.split(rows), strict=True)]
    assert_close(out, torch.cat(expected))


@pytest.mark.parametrize("accumulate", [False, True])
def test_an_expert_without_tokens_has_zeros_for_a_gradient(accumulate):
    """Or what it had, where gradients are added up."""
    rows = [12, 0]
    inputs, gradients = torch.randn(12, INPUTS).split(rows), torch.randn(12, OUTPUTS).split(rows)
    out = [torch.ones(OUTPUTS, INPUTS) for _ in rows]
    grouped_gemm(list(inputs), list(gradients), out, "NT", m_splits=rows, accumulate=accumulate)
    assert_close(out[0], product(inputs[0], gradients[0], "NT") + float(accumulate))
    assert torch.equal(out[1], torch.full_like(out[1], float(accumulate)))


def test_grouped_products_of_fp8(tex):
    rows, weights = [16, 16], [torch.randn(OUTPUTS, INPUTS) for _ in range(2)]
    quantised = [tex.quantize(weight, tensorwise()) for weight in weights]
    parts = tex.split_quantize(torch.randn(TOKENS, INPUTS), rows, [tensorwise(), tensorwise()])
    out = torch.empty(TOKENS, OUTPUTS)
    grouped_gemm(quantised, parts, [out], m_splits=rows, single_output=True)
    pairs = zip(quantised, parts, strict=True)
    assert_close(out, torch.cat([product(values(a), values(b), "TN") for a, b in pairs]))


def fp8(*shape: int, quantizer=None):
    import transformer_engine_torch as tex

    return tex.quantize(torch.randn(*shape), quantizer or tensorwise())


def without_rows(quantised):
    quantised._data = None
    return quantised


REFUSED = {
    "inner dimension 24 is not a multiple of 16": lambda: gemm(fp8(32, 24), fp8(32, 24)),
    "output columns 24 is not a multiple of 16": lambda: gemm(fp8(24, 32), fp8(32, 32)),
    "rows of B, not a multiple of 8": lambda: gemm(
        fp8(128, 128, quantizer=blockwise(2)), fp8(4, 128, quantizer=blockwise(1))
    ),
    "square blocks times square blocks": lambda: gemm(*(fp8(128, 128, quantizer=blockwise(2)) for _ in range(2))),
    "E5M2 times E5M2": lambda: gemm(*(fp8(32, 32, quantizer=tensorwise(E5M2)) for _ in range(2))),
    "A: no row-wise data": lambda: gemm(without_rows(fp8(32, 32)), fp8(32, 32)),
    "A: no column-wise data": lambda: gemm(fp8(32, 32, quantizer=tensorwise(columnwise=False)), fp8(32, 32), "NN"),
    "one operand in FP8, the other not": lambda: gemm(fp8(32, 32), torch.randn(32, 32)),
    "one operand with block scales": lambda: gemm(fp8(128, 128), fp8(128, 128, quantizer=blockwise())),
    r"torch\.float32 times torch\.bfloat16": lambda: gemm(torch.ones(4, 4), torch.ones(4, 4).bfloat16()),
    r"torch\.float32 operands into torch\.bfloat16": lambda: gemm(
        torch.ones(4, 4), torch.ones(4, 4), output_dtype=DType.kBFloat16
    ),
    "not contiguous": lambda: gemm(torch.randn(16, 8).t(), torch.randn(4, 16)),
    r"\(4, 5\) times": lambda: gemm(torch.randn(3, 6), torch.randn(4, 5)),
    r"\(4, 3\) numbers into \(3, 4\)": lambda: gemm(torch.randn(3, 6), torch.randn(4, 6), D=torch.empty(3, 4)),
    r"torch\.bfloat16 is asked for, the result is torch\.float32": lambda: gemm(
        torch.randn(3, 6), torch.randn(4, 6), D=torch.empty(4, 3), output_dtype=DType.kBFloat16
    ),
    "bias in torch.float16": lambda: gemm(torch.randn(3, 6), torch.randn(4, 6), bias=torch.ones(3).half()),
    "fused GELU is not emulated": lambda: gemm(torch.randn(3, 6), torch.randn(4, 6), gelu=True),
    "grouped gemm of expert 1: A: inner dimension 40": lambda: grouped_gemm(
        [fp8(32, 32), fp8(32, 40)], [fp8(16, 32), fp8(16, 40)], [torch.empty(16, 32), torch.empty(16, 32)]
    ),
}


@pytest.mark.skipif(TABLE.at_least("2.17"), reason="newer versions have one format of block scales")
def test_scales_that_travel_are_refused():
    with pytest.raises(KernelRefuses, match="compact block scales"):
        gemm(*(fp8(128, 128, quantizer=blockwise(1, all_gather_usage=True)) for _ in range(2)))


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    with pytest.raises(KernelRefuses, match=message):
        REFUSED[message]()


MORE_REFUSED = {
    "beta 0.5 with accumulate=False": lambda: gemm(*operands("TN"), beta=0.5),
    "overlap with communication is not emulated": lambda: gemm(*operands("TN"), bulk_overlap=True),
    "an extra output is not emulated": lambda: gemm(*operands("TN"), extra_output=torch.empty(0)),
    "not beside a product of numbers with block scales": lambda: gemm(
        fp8(128, 128, quantizer=blockwise(2)), fp8(128, 128, quantizer=blockwise(1)), bias=torch.ones(128), grad=True
    ),
    "grouped gemm: without an output": lambda: grouped_gemm([], [], None),
}


@pytest.mark.parametrize("message", MORE_REFUSED)
def test_more_refusals(message):
    """What Transformer Engine's own Python part would not pass on."""
    with pytest.raises(KernelRefuses, match=message):
        MORE_REFUSED[message]()
