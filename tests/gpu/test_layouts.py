"""Layouts against one rank on the same device: fp32, bf16, and FP8 with routing held fixed."""

import pytest
import torch

from tests.gpu import device
from tests.gpu.compute import Step, compute
from tests.gpu.device import TOLERANCES
from tests.gpu.figures import Figures
from tests.gpu.inputs import gradient_error, relative_error
from tests.gpu.ranks import run
from tests.gpu.test_numerics import BF16, FULL, RECIPES, SHARDED

TP2, PP2, EP2 = ({f"{name}_model_parallel_size": 2} for name in ("tensor", "pipeline", "expert"))
CP2 = {"context_parallel_size": 2}
INTERLEAVED = PP2 | {"num_virtual_stages_per_pipeline_rank": 2}
OVERLAPPED = SHARDED | {"overlap_grad_reduce": True, "overlap_param_gather": True}
FP32 = {"fp32": True}
FLEX = {"moe_token_dispatcher_type": "flex"}
LAYOUTS = {
    "DP2": (2, Step(precision=FP32, optimizer=OVERLAPPED)),
    "TP2+SP": (2, Step(precision=FP32, layout=TP2)),
    "TP2+SP, expert TP2": (2, Step(precision=FP32, layout=TP2 | {"expert_tensor_parallel_size": 2})),
    "EP2": (2, Step(precision=FP32, layout=EP2, optimizer=SHARDED)),
    "PP2": (2, Step(precision=FP32, layout=PP2)),
    "PP2 interleaved": (2, Step(precision=FP32, layout=INTERLEAVED)),
    "TP2xEP2, recompute full": (2, Step(precision=FP32 | FULL, layout=TP2 | EP2)),
    "EP2xPP2": (4, Step(precision=FP32, layout=EP2 | PP2)),
    "TP2xEP2xDP2": (4, Step(precision=FP32, layout=TP2 | EP2, optimizer=OVERLAPPED)),
    "full training, TP2xEP2xPP2": (4, Step(stage="full", precision=FP32, layout=TP2 | EP2 | PP2)),
    "stage 2, TP2xEP2": (2, Step(stage="2", precision=FP32, layout=TP2 | EP2)),
    "bf16, TP2+SP": (2, Step(precision=BF16, layout=TP2, optimizer=OVERLAPPED)),
    "bf16, CP2xTP2xEP2, recompute full": (
        4,
        Step(precision=BF16 | FULL, layout=CP2 | TP2 | EP2, optimizer=OVERLAPPED),
    ),
    "bf16, EP2": (2, Step(precision=BF16, layout=EP2, optimizer=OVERLAPPED)),
    "bf16, EP2, flex": (2, Step(precision=BF16 | FLEX, layout=EP2)),
    "bf16, PP2 interleaved": (2, Step(precision=BF16, layout=INTERLEAVED)),
    **{
        f"fp8 {recipe}, {name}": (2, Step(precision=BF16, fp8=RECIPES[recipe], layout=layout, fixed_routing=True))
        for recipe in ("delayed", "tensorwise")
        for name, layout in (("TP2+SP", TP2), ("EP2", EP2), ("PP2", PP2))
    },
    "fp8 tensorwise, TP2xEP2": (
        2,
        Step(precision=BF16, fp8=RECIPES["tensorwise"], layout=TP2 | EP2, fixed_routing=True),
    ),
    "fp8 delayed, EP2xPP2, recompute full": (
        4,
        Step(precision=BF16 | FULL, fp8=RECIPES["delayed"], layout=EP2 | PP2, fixed_routing=True),
    ),
    "fp8 blockwise, PP2": (2, Step(precision=BF16, fp8=RECIPES["blockwise"], layout=PP2, fixed_routing=True)),
    # Gathered in FP8 the tokens of a rank must fill blocks of 128.
    "fp8 blockwise, TP2+SP": (
        2,
        Step(precision=BF16, fp8=RECIPES["blockwise"], layout=TP2, fixed_routing=True, micro_batch_size=8),
    ),
    "fp8 blockwise, EP2": (
        2,
        Step(precision=BF16, fp8=RECIPES["blockwise"], layout=EP2, fixed_routing=True, micro_batch_size=4),
    ),
}


@pytest.fixture(scope="module")
def figures():
    rows = Figures("relative error against one rank", "logits", "gradients", "loss")
    yield rows
    rows.print()


@pytest.fixture(scope="module")
def one_rank(inputs):
    known = {}

    def get(step: Step) -> dict:
        alone = Step(**(vars(step) | {"layout": {}, "optimizer": {}}))
        if repr(alone) not in known:
            known[repr(alone)] = run(1, compute, "cuda", inputs[0], alone)[0]
        return known[repr(alone)]

    return get


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name, one_rank, inputs, figures):
    world, step = LAYOUTS[name]
    if device.count() < world:
        pytest.skip(f"needs {world} GPUs")
    if step.precision.get("moe_token_dispatcher_type") == "flex":
        pytest.importorskip("deep_ep", reason="needs DeepEP")
    expected = one_rank(step)
    found = run(world, compute, "cuda", inputs[0], step)[0]
    logits = relative_error(found["logits"], expected["logits"])
    gradients = gradient_error(found["gradients"], expected["gradients"])
    figures.add(name, logits=logits, gradients=gradients, loss=f"{found['loss']:.6f}")
    whole = torch.cat([gradient.flatten() for gradient in found["gradients"].values()])
    # The optimizer adds up squares in fp32.
    assert found["norm"] == pytest.approx(whole.double().norm().item(), rel=1e-4)
    logits_limit, gradients_limit = limits(step)
    assert logits < logits_limit
    assert gradients < gradients_limit


def limits(step: Step) -> tuple[float, float]:
    """Of logits and gradients. In FP8 PP multiplies the same operands as one rank, EP in the forward pass."""
    if not step.fp8:
        limit = TOLERANCES.bf16_layout if "bf16" in step.precision else TOLERANCES.fp32
        return limit, limit
    same = TOLERANCES.fp32 if device.EMULATED else TOLERANCES.bf16_layout
    if step.layout == PP2:
        return same, same
    return (same if step.layout == EP2 else TOLERANCES.fp8), TOLERANCES.fp8
