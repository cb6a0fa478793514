"""A GPU that is not there, for rehearsals: Megatron takes the paths of GPUs and NCCL, and tensors lie in host memory.

Layers are those of PyTorch alone, as on GPUs without Transformer Engine. Nothing here can train: the caller replaces
the collectives (`rehearsal/recorder.py`), and mostly computes nothing either (`rehearsal/sizes_only.py`).
"""

import ctypes
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from megatron_moe_lpr import platform
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.megatron.overriding import replace
from megatron_moe_lpr.platform import GPUFacts, Platform

BACKEND = "fake"
"""torch's process group without communication; its groups exist as soon as they are asked for."""
FACTS = GPUFacts(capability=(9, 0), cuda=(12, 8), transformer_engine=None, grouped_products=True)
"""An H100 with a PyTorch that multiplies the matrices of several experts in one launch."""
_simulated: Platform | None = None


def select_simulated() -> Platform:
    """Choose the simulated GPU for this process.

    Raises:
        UserError: the process has chosen another platform before.
    """
    global _simulated
    if _simulated is None:
        if platform._selected is not None:
            raise UserError(
                f"a rehearsal needs a process of its own: this one already runs on {platform._selected.name}"
            )
        _install()
        _simulated = Platform("cuda", "nccl", torch.device("cpu"), transformer_engine=False, gpu=FACTS)
        platform._selected = _simulated
    return _simulated


M_MMAP_THRESHOLD = -3
"""Number of glibc's setting (malloc.h)."""
MAPPED_BYTES = 1 << 17


def reserve_without_writing() -> bool:
    """Let malloc map every large tensor anew, so that it takes no memory and holds zeros until it is written to.

    Returns:
        False: there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES))


class _Norm(torch.autograd.Function):
    """Keeps what CUDA's `_fused_rms_norm` keeps: its input and, in fp32, a number for each row
    (aten/native/cuda/layer_norm_kernel.cu, derivatives.yaml). On a CPU torch keeps copies in fp32."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = inputs.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(inputs, weight, scale)
        return (wide * scale * weight.float()).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        inputs, weight, scale = ctx.saved_tensors
        normalised, wide = inputs.float() * scale, gradients[0].float()
        grad_inputs = grad_weight = None
        if ctx.needs_input_grad[0]:
            weighted = wide * weight.float()
            shared = (weighted * normalised).mean(-1, keepdim=True)
            grad_inputs = (scale * (weighted - normalised * shared)).to(inputs.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (wide * normalised).flatten(0, -2).sum(0).to(weight.dtype)
        return grad_inputs, grad_weight, None


def rms_norm(inputs: torch.Tensor, shape: Sequence[int], weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`torch.nn.functional.rms_norm` over the last dimension, in the memory that it takes on a GPU."""
    return _Norm.apply(inputs, weight, eps)


def _install() -> None:
    import megatron_moe_lpr.platform.cpu.devices as devices
    import megatron_moe_lpr.platform.cpu.streams as streams

    streams.install()
    devices.install()
    # Pinned memory is asked for as on GPUs.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
    replace(torch.nn.functional, rms_norm=rms_norm)
    replace(torch.Tensor, pin_memory=lambda self, *args, **kwargs: self)
    # After the two above, because they import megatron-core, which reads torch.cuda while being imported.
    from megatron_moe_lpr.platform import torch_only
    from megatron_moe_lpr.platform.cpu import internals

    internals.install()
    torch_only.install()
