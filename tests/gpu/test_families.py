"""Every family's own parts on the device against the local layers: QK norm, sliding window, head size, rope
scaling, multipliers, norms of outputs, the parallel block, layers without positions."""

import dataclasses

import pytest

from tests.gpu import device
from tests.gpu.compute import Step, compute
from tests.gpu.device import TOLERANCES
from tests.gpu.figures import Figures
from tests.gpu.inputs import gpu_checkpoint, gradient_error, relative_error
from tests.gpu.ranks import run
from tests.gpu.test_numerics import BF16, TENSORWISE

FAMILIES = ("qwen3", "llama3-tied", "mistral", "granite", "olmo2", "cohere2")  # all other tests take Qwen2
FP32 = {"fp32": True}
FEWER_BITS = 2.0**4
"""Of e4m3's significand against bfloat16's; e5m2, of gradients, has one bit less still."""
STEPS = {"fp32": Step(precision=FP32), "bf16": Step(precision=BF16), "fp8": Step(precision=BF16, fp8=TENSORWISE)}


@pytest.fixture(scope="module")
def figures():
    rows = Figures("stage 1: relative error against the CPU platform in fp32", "logits", "gradients")
    yield rows
    rows.print()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family, figures, tmp_path):
    checkpoint = gpu_checkpoint(tmp_path, family)
    # FP8 rounds so much that tokens would go to other experts.
    for routing, names in ((False, ("fp32", "bf16")), (True, ("fp8",))):
        exact, measure = (
            run(1, compute, "cpu", checkpoint, Step(precision=precision, fixed_routing=routing), platform="cpu")[0]
            for precision in (FP32, BF16)
        )
        for name in names:
            step = dataclasses.replace(STEPS[name], fixed_routing=routing)
            found = run(1, compute, "cuda", checkpoint, step)[0]
            errors = {}
            for what, error in (("logits", relative_error), ("gradients", gradient_error)):
                errors[what] = error(found[what], exact[what])
                bf16_error = error(measure[what], exact[what])
                limit = TOLERANCES.fp32 if name == "fp32" else (FEWER_BITS if step.fp8 else 2.0) * bf16_error
                assert errors[what] < limit, (name, what)
            figures.add(f"{family}: {name}", **errors)


@pytest.mark.parametrize("family", ["olmo2", "cohere2"])
def test_own_layers_over_tp_ranks(family, tmp_path):
    """The norm over all heads, and the parallel block, whose one norm both halves gather under SP."""
    if device.count() < 2:
        pytest.skip("needs 2 devices")
    checkpoint = gpu_checkpoint(tmp_path, family)
    step = Step(stage="full", precision=FP32)
    alone = run(1, compute, "cuda", checkpoint, step)[0]
    layout = {"tensor_model_parallel_size": 2}
    for found in run(2, compute, "cuda", checkpoint, dataclasses.replace(step, layout=layout)):
        assert relative_error(found["logits"], alone["logits"]) < TOLERANCES.fp32
        assert gradient_error(found["gradients"], alone["gradients"]) < TOLERANCES.fp32
