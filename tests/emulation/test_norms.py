"""RMSNorm and SwiGLU against float64 and its autograd."""

import pytest
import torch

from tests.emulation.builders import delayed, tensorwise, values
from tests.emulation.kernels import KernelRefuses
from tests.emulation.names import DType

EPSILON = 1e-5


def normed(source: torch.Tensor, weight: torch.Tensor, zero_centered: bool = False) -> torch.Tensor:
    gamma = weight + 1 if zero_centered else weight
    return source / (source.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * gamma


@pytest.fixture
def source():
    return torch.randn(6, 32), torch.randn(32)


def forward(tex, source, weight, quantizer=None, output=None, zero_centered=False, dtype=DType.kFloat32):
    return tex.rmsnorm_fwd(source, weight, EPSILON, output, quantizer, dtype, 0, zero_centered)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rmsnorm(zero_centered, source, tex):
    found, mean, rsigma = forward(tex, *source, zero_centered=zero_centered)
    exact, weight = source[0].double(), source[1].double()
    torch.testing.assert_close(found.double(), normed(exact, weight, zero_centered), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rsigma.double(), (exact.pow(2).mean(-1) + EPSILON).rsqrt(), rtol=1e-6, atol=0)
    assert mean is None


@pytest.mark.parametrize("zero_centered", [False, True])
def test_gradients_of_rmsnorm(zero_centered, source, tex):
    exact, weight = (tensor.double().requires_grad_() for tensor in source)
    gradient = torch.randn(6, 32)
    normed(exact, weight, zero_centered).backward(gradient.double())
    _, _, rsigma = forward(tex, *source, zero_centered=zero_centered)
    grad_input, grad_weight = tex.rmsnorm_bwd(gradient, source[0], rsigma, source[1], 0, zero_centered)
    torch.testing.assert_close(grad_input.double(), exact.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_weight.double(), weight.grad, rtol=1e-5, atol=1e-6)


def test_rmsnorm_into_an_output_and_into_fp8(source, tex):
    plain = forward(tex, *source)[0]
    output = torch.empty_like(plain)
    assert forward(tex, *source, output=output)[0] is output
    assert torch.equal(output, plain)
    for make in (tensorwise, lambda: delayed(50.0)):
        found = forward(tex, *source, quantizer=make())[0]
        assert torch.equal(values(found), values(tex.quantize(plain, make())))


def test_bf16_norms_take_bf16_weights(source, tex):
    rows, weight = (tensor.bfloat16() for tensor in source)
    found = forward(tex, rows, weight, dtype=DType.kBFloat16)[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), normed(rows.double(), weight.double()), rtol=2**-8, atol=1e-6)


def test_swiglu_and_its_gradient(tex):
    source, gradient = torch.randn(6, 32), torch.randn(6, 16)
    exact = source.double().requires_grad_()
    gate, value = exact.chunk(2, -1)
    expected = gate * torch.sigmoid(gate) * value
    expected.backward(gradient.double())
    torch.testing.assert_close(tex.swiglu(source, None).double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tex.dswiglu(gradient, source, None).double(), exact.grad, rtol=1e-5, atol=1e-6)
    quantised = tex.swiglu(source, tensorwise())
    assert torch.equal(values(quantised), values(tex.quantize(tex.swiglu(source, None), tensorwise())))
    quantised = tex.dswiglu(gradient, source, tensorwise())
    assert torch.equal(values(quantised), values(tex.quantize(tex.dswiglu(gradient, source, None), tensorwise())))


def test_refusals(source, tex):
    rows, weight = source
    with pytest.raises(KernelRefuses, match="not contiguous"):
        forward(tex, torch.randn(32, 6).t(), weight)
    with pytest.raises(KernelRefuses, match="two dimensions are expected, not 3"):
        forward(tex, rows[None], weight)
    with pytest.raises(KernelRefuses, match=r"gradient in torch\.float32, input in torch\.bfloat16"):
        tex.rmsnorm_bwd(rows, rows.bfloat16(), torch.ones(6), weight, 0, False)
    with pytest.raises(KernelRefuses, match="not contiguous"):
        tex.rmsnorm_bwd(torch.randn(32, 6).t(), rows, torch.ones(6), weight, 0, False)
