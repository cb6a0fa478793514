"""Kernels over lists of tensors: scaling, norms, Adam."""

import torch

from tests.emulation.fp8 import scale_for
from tests.emulation.kernels import FUNCTIONS, kernel, refuse_unless
from tests.emulation.names import DType
from tests.emulation.table import TABLE

Lists = list[list[torch.Tensor]]


def _check(name: str, noop: torch.Tensor, lists: Lists) -> None:
    """Mirrors common/multi_tensor/multi_tensor_apply.cuh: same lengths and sizes, contiguous."""
    refuse_unless(noop.dtype == torch.int32, f"{name}: the flag is {noop.dtype}, int32 is expected")
    for column in zip(*lists, strict=True):
        refuse_unless(len({tensor.numel() for tensor in column}) == 1, f"{name}: tensors of different sizes")
        refuse_unless(all(tensor.is_contiguous() for tensor in column), f"{name}: a tensor is not contiguous")


@kernel("optimizers/__init__.py, megatron/core/optimizer/clip_grads.py, tensor/utils.py")
def multi_tensor_scale(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Lists, scale: float) -> None:
    """Second list = first * scale; the flag is set where a number is not finite."""
    _check("multi_tensor_scale", noop_flag, tensor_lists)
    for source, target in zip(*tensor_lists, strict=True):
        if not torch.isfinite(source).all():
            noop_flag.fill_(1)
        target.copy_(source.float() * scale)


@kernel("optimizers/__init__.py, megatron/core/optimizer/clip_grads.py")
def multi_tensor_scale_tensor(
    chunk_size: int, is_infinite: torch.Tensor, tensor_lists: Lists, scale: torch.Tensor
) -> None:
    """The same with a factor on the device."""
    refuse_unless(scale.numel() == 1 and scale.dtype == torch.float32, "multi_tensor_scale_tensor: one fp32 factor")
    FUNCTIONS["multi_tensor_scale"](chunk_size, is_infinite, tensor_lists, float(scale))


def _norms(values: list[torch.Tensor], per_tensor: bool) -> tuple[torch.Tensor, torch.Tensor]:
    norms = torch.stack([value.float().norm() for value in values])
    return norms.norm().reshape(1), norms if per_tensor else torch.empty(0)


@kernel("optimizers/__init__.py, megatron/core/optimizer/clip_grads.py `get_grad_norm_fp32`")
def multi_tensor_l2norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Lists, per_tensor_python: bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm of all tensors together."""
    _check("multi_tensor_l2norm", noop_flag, tensor_lists)
    return _norms(tensor_lists[0], bool(per_tensor_python))


@kernel("optimizers/__init__.py")
def multi_tensor_unscale_l2norm(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Lists,
    inv_scale: torch.Tensor,
    per_tensor_python: bool | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm of all tensors together, multiplied by a number on the device."""
    _check("multi_tensor_unscale_l2norm", noop_flag, tensor_lists)
    return _norms([tensor.float() * inv_scale for tensor in tensor_lists[0]], bool(per_tensor_python))


@kernel("optimizers/fused_adam.py FusedAdam.step")
def multi_tensor_adam(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Gradients, parameters, two moments and, for half precision, fp32 parameters; mode 1 decays like AdamW."""
    _check("multi_tensor_adam", noop_flag, tensor_lists)
    refuse_unless(len(tensor_lists) in (4, 5), f"multi_tensor_adam: {len(tensor_lists)} lists")
    _check_moments("multi_tensor_adam", tensor_lists)
    # The flag is not looked at: an infinite gradient goes through, as in common/multi_tensor/adam.cu.
    settings = (lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)
    gradients, parameters, firsts, seconds = tensor_lists[:4]
    masters = tensor_lists[4] if len(tensor_lists) == 5 else parameters
    for gradient, parameter, first, second, master in zip(gradients, parameters, firsts, seconds, masters, strict=True):
        value = _adam_update(gradient, master.float(), first, second, *settings)
        parameter.copy_(value)
        if master is not parameter:
            master.copy_(value)


def _check_moments(name: str, lists: Lists) -> None:
    """Mirrors common/multi_tensor/adam.cu: one type of gradients; both moments fp32 or, from 2.17 on, both bf16."""
    refuse_unless(len({gradient.dtype for gradient in lists[0]}) <= 1, f"{name}: gradients of different types")
    allowed = [torch.float32, torch.bfloat16] if TABLE.at_least("2.17") else [torch.float32]
    for first, second in zip(*lists[2:4], strict=True):
        refuse_unless(first.dtype == second.dtype and first.dtype in allowed, f"{name}: moments are {first.dtype}")


def _adam_update(
    gradient: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> torch.Tensor:
    """The new fp32 value; the moments are changed in place, computed in fp32 and rounded once."""
    first_correction, second_correction = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    gradient = gradient.float()
    if mode == 0:
        gradient = gradient + weight_decay * value
    mean = first.float().mul(beta1).add_(gradient, alpha=1 - beta1)
    square = second.float().mul(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    first.copy_(mean)
    second.copy_(square)
    update = (mean / first_correction) / ((square / second_correction).sqrt() + epsilon)
    if mode == 1:
        update = update + weight_decay * value
    return value - lr * update


@kernel("optimizers/fused_adam.py FusedAdam.step with store_param_remainders")
def multi_tensor_adam_param_remainder(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Gradients, bf16 parameters, two moments and the lower 16 bits of the fp32 parameters."""
    name = "multi_tensor_adam_param_remainder"
    _check(name, noop_flag, tensor_lists)
    refuse_unless(len(tensor_lists) == 5, f"{name}: {len(tensor_lists)} lists")
    _check_moments(name, tensor_lists)
    settings = (lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)
    for gradient, parameter, first, second, remainder in zip(*tensor_lists, strict=True):
        refuse_unless(parameter.dtype == torch.bfloat16, f"{name}: a parameter is {parameter.dtype}")
        refuse_unless(remainder.dtype == torch.int16, f"{name}: a remainder is {remainder.dtype}")
        # int16[0] of the union are the lower bits; rounding is undone where they are negative as a number.
        halves = torch.stack([remainder, parameter.view(torch.int16) - (remainder < 0).to(torch.int16)], dim=-1)
        value = _adam_update(gradient, halves.view(torch.float32).squeeze(-1), first, second, *settings)
        halves = value.unsqueeze(-1).view(torch.int16)
        remainder.copy_(halves[..., 0])
        parameter.view(torch.int16).copy_(halves[..., 1] + (halves[..., 0] < 0).to(torch.int16))


@kernel("tensor/utils.py `_cast_master_weights_to_fp8_current_scaling`")
def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Lists,
    max_fp8: float,
    force_pow_2_scales: bool,
    epsilon: float,
) -> None:
    """Largest magnitudes to scales and their inverses."""
    _check("multi_tensor_compute_scale_and_scale_inv", noop_flag, tensor_lists)
    dtype = {448.0: DType.kFloat8E4M3, 57344.0: DType.kFloat8E5M2}[max_fp8]
    for amax, scale, inverse in zip(*tensor_lists, strict=True):
        scale.copy_(scale_for(amax, dtype, force_pow_2_scales, epsilon))
        inverse.copy_(1.0 / scale)
