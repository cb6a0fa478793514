"""Every family's own parts on the device against the local layers: QK norm, sliding window, head size, rope
scaling, multipliers, norms of outputs, the parallel block, layers without positions."""

import pytest

from tests.gpu.compute import Step, compute
from tests.gpu.device import TOLERANCES
from tests.gpu.figures import Figures
from tests.gpu.inputs import gpu_checkpoint, gradient_error, relative_error
from tests.gpu.ranks import run
from tests.gpu.test_numerics import BF16

FAMILIES = ("qwen3", "llama3-tied", "mistral", "granite", "olmo2", "cohere2")  # all other tests take Qwen2
FP32 = {"fp32": True}


@pytest.fixture(scope="module")
def figures():
    rows = Figures("stage 1: relative error against the CPU platform in fp32", "logits", "gradients")
    yield rows
    rows.print()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family, figures, tmp_path):
    checkpoint = gpu_checkpoint(tmp_path, family)
    exact = run(1, compute, "cpu", checkpoint, Step(precision=FP32), platform="cpu")[0]
    measure = run(1, compute, "cpu", checkpoint, Step(precision=BF16), platform="cpu")[0]
    for name, precision in (("fp32", FP32), ("bf16", BF16)):
        found = run(1, compute, "cuda", checkpoint, Step(precision=precision))[0]
        errors = {}
        for what, error in (("logits", relative_error), ("gradients", gradient_error)):
            errors[what] = error(found[what], exact[what])
            limit = TOLERANCES.fp32 if name == "fp32" else 2.0 * error(measure[what], exact[what])
            assert errors[what] < limit, (name, what)
        figures.add(f"{family}: {name}", **errors)
