"""Transformer Engine's grouped linear layers on the CPU: its own autograd function over plain matrix products."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.loading.model import LoadedModel
from megatron_moe_lpr.engine.gradient_watch import GradientWatch
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.training.configuration.stages import STAGES, freeze
from tests.emulation import extension
from tests.transformer_engine import models

EXPERTS = "decoder.layers.0.mlp.experts."
TOKENS_PER_EXPERT = (5, 0, 7, 3)  # one without a token


def plain_grouped_gemm(
    first: list[torch.Tensor],
    second: list[torch.Tensor],
    out: list[torch.Tensor],
    quantization_params: Any,
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: list[int] | None = None,
    single_output: bool = False,
    accumulate: bool = False,
    **unused: Any,
) -> tuple:
    """`general_grouped_gemm` of cpp_extensions/gemm.py: out = second x first, each transposed as `layout` says."""
    targets = torch.split(out[0], m_splits) if single_output else out
    for left, right, target in zip(second, first, targets, strict=True):
        left = left.t() if layout[1] == "T" else left
        product = left @ (right.t() if layout[0] == "T" else right)
        target.copy_(target + product if accumulate else product)
    return out, [None] * len(first), None


def _replace_kernels() -> None:
    """On a rank with Transformer Engine: the product, and the entrance that lets CUDA tensors alone in."""
    if not extension.is_installed():
        return
    from transformer_engine.pytorch.module import grouped_linear

    grouped_linear.general_grouped_gemm = plain_grouped_gemm
    # Newer versions call it as a function, and `end_forward` after it.
    called = hasattr(grouped_linear.GroupedLinear, "prepare_forward_ctx")
    grouped_linear.GroupedLinear.prepare_forward = _prepare_forward if called else _prepared


def _prepare_forward(self: Any, inp: torch.Tensor, num_gemms: int = 1) -> torch.Tensor:
    """What `TransformerEngineBaseModule.prepare_forward` does without FP8, less its look at the device."""
    self.allow_different_data_and_param_types = False
    self.set_activation_dtype(inp)
    self.init_fp8_metadata(num_gemms=num_gemms)
    return inp.contiguous()


@contextlib.contextmanager
def _prepared(self: Any, inp: torch.Tensor, num_gemms: int = 1) -> Iterator[torch.Tensor]:
    yield _prepare_forward(self, inp, num_gemms)


def _run_experts(model: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward of the first layer's new experts on fixed tokens: output and the input's gradient."""
    experts = unwrap(model.chunks[0]).decoder.layers[0].mlp.experts
    experts.config.bias_activation_fusion = False  # compiled by torch for the GPU
    generator = torch.Generator().manual_seed(5)
    count, hidden = sum(TOKENS_PER_EXPERT), model.config.hidden_size
    tokens = torch.randn(count, hidden, generator=generator).requires_grad_()
    weights = torch.rand(count, generator=generator)
    output, _ = experts(tokens, torch.tensor(TOKENS_PER_EXPERT), weights)
    (output * torch.randn(count, hidden, generator=generator)).sum().backward()
    return output.detach(), tokens.grad


def expert_gradients(path: Path, stage: str) -> dict[str, torch.Tensor | None]:
    """Gradient of every new expert of the first layer in this stage; None: there is none."""
    _replace_kernels()
    model = models.load(path)
    freeze(model.chunks, STAGES[stage])
    output, input_gradient = _run_experts(model)
    gradients = {
        name: parameter.grad
        for name, parameter in unwrap(model.chunks[0]).named_parameters()
        if name.startswith(EXPERTS)
    }
    return {"output": output, "input": input_gradient} | gradients


def unmarked_weights(path: Path) -> list[str]:
    """New experts' weights that the norm of all gradients would take for copies of another TP rank's."""
    parameters = unwrap(models.load(path).chunks[0]).named_parameters()
    experts = {name: parameter for name, parameter in parameters if name.startswith(EXPERTS)}
    assert experts
    return [name for name, parameter in experts.items() if not getattr(parameter, "tensor_model_parallel", False)]


def watch_wrong_freeze(path: Path, frozen_expert: int | None) -> str | None:
    """Freeze one expert inside the group and step under the guard of the first step; its error, if it raises one."""
    _replace_kernels()
    model = models.load(path)
    for name, parameter in unwrap(model.chunks[0]).named_parameters():
        parameter.requires_grad_(name.startswith(EXPERTS) and not name.endswith(f"weight{frozen_expert}"))
    watch = GradientWatch(model.chunks)
    _run_experts(model)
    try:
        watch.check()
    except UserError as error:
        return str(error)
    return None
