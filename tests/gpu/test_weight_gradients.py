"""Weight gradients that Transformer Engine's products add to the gradient buffer: as without, and one pass less."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moe_lpr.engine.micro_batches import run_schedule, to_device
from megatron_moe_lpr.engine.optimizer import wrap_data_parallel
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.platform import select_platform
from tests.gpu import compute as one_step
from tests.gpu import device
from tests.gpu.compute import Step, compute, route_to
from tests.gpu.device import TOLERANCES
from tests.gpu.inputs import gradient_error
from tests.gpu.ranks import run
from tests.gpu.test_layouts import EP2, INTERLEAVED, OVERLAPPED, TP2
from tests.gpu.test_numerics import BF16, FULL, RECIPES
from tests.training.one_step import LANGUAGE_GROUP, gather_gradients, micro_batches

FP32 = {"fp32": True}
UNFUSED = {"gradient_accumulation_fusion": False}
GATHER = {"fp8_param_gather": True}
STEPS = {
    "stage 1, fp32": (1, Step("1", FP32)),
    "stage full, fp32": (1, Step("full", FP32)),
    "stage 1, bf16": (1, Step("1", BF16)),
    **{f"stage full, fp8 {name}": (1, Step("full", BF16, RECIPES[name])) for name in ("delayed", "blockwise")},
    "stage 1, fp8 tensorwise, recompute full": (1, Step("1", BF16 | FULL, RECIPES["tensorwise"])),
    "stage 1, weights in FP8": (1, Step("1", BF16, RECIPES["tensorwise"] | GATHER, optimizer=OVERLAPPED)),
    "DP2, overlap": (2, Step("full", BF16, optimizer=OVERLAPPED)),
    "TP2+SP": (2, Step("full", FP32, layout=TP2)),
    "EP2, a rank without a token": (2, Step("1", FP32, layout=EP2, optimizer=OVERLAPPED, experts=(0, 1))),
    "EP2, fp8 tensorwise": (2, Step("1", BF16, RECIPES["tensorwise"], EP2, OVERLAPPED)),
    "PP2 interleaved, fp8 delayed": (2, Step("1", BF16, RECIPES["delayed"], INTERLEAVED)),
}
ROUNDING = {"fp32": TOLERANCES.fp32, "bf16": 2.0**-9}
"""Relative error in the norm: of sums in another order, and of each micro-batch's gradient rounded to bf16."""


def unfused(step: Step) -> Step:
    return dataclasses.replace(step, precision=step.precision | UNFUSED)


@pytest.mark.parametrize("name", STEPS)
def test_they_equal_those_that_are_added_later(name, inputs):
    world, step = STEPS[name]
    if device.count() < world:
        pytest.skip(f"needs {world} GPUs")
    found, expected = (run(world, compute, "cuda", inputs[0], one)[0] for one in (step, unfused(step)))
    assert torch.equal(found["logits"], expected["logits"])
    error = gradient_error(found["gradients"], expected["gradients"])
    assert error < ROUNDING["fp32" if step.precision == FP32 else "bf16"]
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-3)


class _Additions(TorchDispatchMode):
    """Counts additions to gradient buffers."""

    def __init__(self, chunks: list) -> None:
        super().__init__()
        buffers = (buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))
        self.storages = {buffer.grad_data.untyped_storage().data_ptr() for buffer in buffers}
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten.add_.Tensor:
            self.count += args[0].untyped_storage().data_ptr() in self.storages
        return function(*args, **(kwargs or {}))


@dataclasses.dataclass
class Again:
    """A second step of the same model, with every token at the original expert and the first new one."""

    additions: int
    """To gradient buffers, in the hooks of the second step's micro-batches."""
    gradients: dict[str, torch.Tensor]
    """Of the second step."""
    frozen_buffers: list[str]
    """Frozen parameters with a `main_grad`."""


def another_step(checkpoint: Path, step: Step) -> Again:
    """On every rank: what a second step leaves in the gradient buffers, after one with the router's own choice."""
    wrapped: list = []

    def wrap(chunks: list, config: Any, options: Any) -> list:
        wrapped[:] = [*wrap_data_parallel(chunks, config, options)]
        return wrapped

    with patch.object(one_step, "wrap_data_parallel", wrap):
        compute("cuda", checkpoint, step)
    route_to(wrapped, (0, 1))
    for chunk in wrapped:
        chunk.zero_grad_buffer()
        chunk.zero_grad()  # the optimizer's, which are the buffers in fp32
    to = select_platform("cuda").device
    batches = [to_device(batch, to) for batch in micro_batches(step.micro_batch_size)]
    with _Additions(wrapped) as additions:
        run_schedule(wrapped, unwrap(wrapped[0]).config, batches, LANGUAGE_GROUP.to(to))
    gradients = {key: gradient.float().cpu() for key, gradient in gather_gradients(wrapped).items()}
    parameters = [named for chunk in wrapped for named in unwrap(chunk).named_parameters()]
    frozen = [name for name, weight in parameters if not weight.requires_grad and hasattr(weight, "main_grad")]
    return Again(additions.count, gradients, frozen)


LAYERS, EXPERTS, BATCHES = 4, 4, 4
ROUTERS = LAYERS * BATCHES
MATRICES = LAYERS * EXPERTS * 2 * BATCHES
ATTENTION_AND_ORIGINAL = LAYERS * 4 * BATCHES


@pytest.mark.parametrize(
    ("stage", "recipe", "spared"),
    [
        ("1", None, MATRICES),
        ("1", "tensorwise", MATRICES),
        ("2", None, 0),
        ("full", "delayed", MATRICES + ATTENTION_AND_ORIGINAL),
    ],
)
def test_no_matrix_of_a_layer_is_added_a_second_time(stage, recipe, spared, inputs):
    """And idle experts keep nothing of the step before."""
    step = Step(stage, BF16, RECIPES.get(recipe, {}))
    found, expected = (run(1, another_step, inputs[0], one)[0] for one in (step, unfused(step)))
    if device.EMULATED:  # on a GPU the hooks run in a thread of autograd's
        assert expected.additions - found.additions == spared
        assert stage == "full" or found.additions == ROUTERS
    assert found.frozen_buffers == expected.frozen_buffers == []
    assert gradient_error(found.gradients, expected.gradients) < ROUNDING["bf16"]
    if stage == "2":
        return
    # All gradients but those of zeros, which an idle expert must have.
    assert {key.split(".experts.experts.")[1][0] for key in found.gradients if ".experts.experts." in key} == {"0"}


def error_with_hooks(checkpoint: Path, step: Step) -> str | None:
    """On every rank: the error that ends a step whose saved tensors go through hooks, as offloaded ones do."""
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        try:
            compute("cuda", checkpoint, step)
        except UserError as error:
            return str(error)
    return None


def test_hooks_on_saved_tensors_are_noticed_and_harmless_without(inputs):
    """Why offloading of activations excludes it: Transformer Engine 2.11 no longer knows the parameters."""
    step = Step("1", BF16)
    assert run(1, error_with_hooks, inputs[0], unfused(step))[0] is None
    message = run(1, error_with_hooks, inputs[0], step)[0]
    assert message is None or "32 trainable parameters got no gradient in the first step" in message
