"""RMSNorm and SwiGLU, forward and backward."""

import torch

from tests.emulation.engine import Quantizer, engine
from tests.emulation.kernels import contiguous, kernel, refuse_unless
from tests.emulation.names import TORCH_DTYPE, DType
from tests.emulation.quantization import quantized


@kernel("module/_common.py `apply_normalization`")
def rmsnorm_fwd(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    ln_out: object,
    quantizer: Quantizer | None,
    otype: DType,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple:
    """Normed rows, no mean, and 1 / root mean square of each row in fp32."""
    contiguous("rmsnorm_fwd", input, weight)
    refuse_unless(input.dim() == 2, f"rmsnorm_fwd: two dimensions are expected, not {input.dim()}")
    source, dtype = input.detach().float(), TORCH_DTYPE[DType(otype)]
    rsigma = torch.rsqrt(source.pow(2).mean(-1) + eps)
    normed = source * rsigma[..., None] * _gamma(weight.detach(), zero_centered_gamma)
    if quantizer is None:
        if ln_out is None:
            return normed.to(dtype), None, rsigma
        ln_out.copy_(normed)
        return ln_out, None, rsigma
    # Delayed scaling alone is one kernel with the norm; for the others its result is rounded first.
    fused = isinstance(quantizer, engine().Float8Quantizer)
    result = quantized(normed if fused else normed.to(dtype), quantizer, ln_out)
    if ln_out is None and isinstance(result, torch.Tensor) and result.dtype != dtype:
        result = type(result).make_like(result, dtype=dtype)
    return result, None, rsigma


@kernel("module/layernorm_linear.py `_LayerNormLinear`, ops/basic/rmsnorm.py")
def rmsnorm_bwd(
    dz: torch.Tensor,
    x: torch.Tensor,
    rsigma: torch.Tensor,
    gamma: torch.Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input and weight."""
    contiguous("rmsnorm_bwd", dz, x, gamma)
    refuse_unless(dz.dtype == x.dtype, f"rmsnorm_bwd: gradient in {dz.dtype}, input in {x.dtype}")
    source, gradient = x.float(), dz.float()
    normed = source * rsigma[..., None]
    weighted = gradient * _gamma(gamma, zero_centered_gamma)
    dx = rsigma[..., None] * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (gradient * normed).sum(0).to(gamma.dtype)


def _gamma(weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return weight.float() + (1.0 if zero_centered else 0.0)


def _swiglu(tensor: torch.Tensor) -> torch.Tensor:
    gate, value = tensor.chunk(2, -1)
    return torch.nn.functional.silu(gate) * value


@kernel("module/layernorm_mlp.py, ops/basic/activation.py")
def swiglu(input: torch.Tensor, quantizer: Quantizer | None) -> object:
    """silu(first half) * second half."""
    result = _swiglu(input.float()).to(input.dtype)
    return result if quantizer is None else quantized(result, quantizer)


@kernel("module/layernorm_mlp.py, ops/basic/activation.py")
def dswiglu(grad: torch.Tensor, fwd_input: torch.Tensor, quantizer: Quantizer | None) -> object:
    """Gradient of swiglu's input."""
    with torch.enable_grad():
        source = fwd_input.detach().float().requires_grad_()
        (result,) = torch.autograd.grad(_swiglu(source), source, grad.float())
    result = result.to(fwd_input.dtype)
    return result if quantizer is None else quantized(result, quantizer)
