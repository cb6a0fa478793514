"""`--original-expert-overlap` on the device: the original expert beside the new ones gives what it gives behind."""

import pytest
import torch

from tests.gpu import device
from tests.gpu.compute import Step, compute
from tests.gpu.device import TOLERANCES
from tests.gpu.inputs import gradient_error, relative_error
from tests.gpu.ranks import run
from tests.gpu.test_layouts import EP2, OVERLAPPED, TP2
from tests.gpu.test_numerics import BF16, FULL, MOE, RECIPES

STEPS = {
    "one rank, bf16": (1, Step(precision=BF16)),
    "EP2, fp32": (2, Step(precision={"fp32": True}, layout=EP2)),
    "EP2, bf16, overlapped reduction": (2, Step(precision=BF16, layout=EP2, optimizer=OVERLAPPED)),
    "EP2, bf16, recompute moe": (2, Step(precision=BF16 | MOE, layout=EP2)),
    "EP2, bf16, full training": (2, Step(stage="full", precision=BF16, layout=EP2)),
    "EP2, bf16, stage 2": (2, Step(stage="2", precision=BF16, layout=EP2)),
    "TP2+SP, EP2, bf16, recompute full": (2, Step(precision=BF16 | FULL, layout=TP2 | EP2)),
    "EP2, fp8 tensorwise, recompute moe": (2, Step(precision=BF16 | MOE, fp8=RECIPES["tensorwise"], layout=EP2)),
    "TP2+SP, EP2, fp8 delayed": (2, Step(precision=BF16, fp8=RECIPES["delayed"], layout=TP2 | EP2)),
}


@pytest.mark.parametrize("name", STEPS)
def test_beside_or_behind(name, inputs):
    """Bit for bit on the emulated device. A real one may add up in another order each time."""
    world, step = STEPS[name]
    if device.count() < world:
        pytest.skip(f"needs {world} GPUs")
    beside = Step(**(vars(step) | {"precision": step.precision | {"original_expert_overlap": True}}))
    expected, found = (run(world, compute, "cuda", inputs[0], case)[0] for case in (step, beside))
    if device.EMULATED:
        assert found["loss"] == expected["loss"] and found["norm"] == expected["norm"]
        assert torch.equal(found["logits"], expected["logits"])
        assert found["gradients"].keys() == expected["gradients"].keys()
        for key, gradient in expected["gradients"].items():
            assert torch.equal(found["gradients"][key], gradient), key
    else:
        assert relative_error(found["logits"], expected["logits"]) < TOLERANCES.bf16_layout
        assert gradient_error(found["gradients"], expected["gradients"]) < TOLERANCES.bf16_layout
