"""Documents apart on the device: each as alone on the CPU, in Transformer Engine's packed form and in local layers."""

import pytest

from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from tests.gpu.device import LOCAL, TOLERANCES
from tests.gpu.inputs import SIZES, perturb_a_little
from tests.gpu.ranks import run
from tests.gpu.test_layouts import TP2
from tests.gpu.test_numerics import BF16
from tests.training.documents import DocumentCase, documents_checkpoint, errors, run_documents
from tests.training.test_layouts import FULL, PP2, SELECTIVE

FP32 = {"fp32": True}
CASES = {
    "one rank": (1, {}, FP32),
    "TP2+SP, recompute full": (2, TP2, FP32 | FULL),
    "PP2": (2, PP2, FP32),
}
WHAT = ("logits", "gradients")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Sliding window of 8 tokens and yarn."""
    sizes = SIZES | {"initializer_range": 0.05}
    return documents_checkpoint(tmp_path_factory.mktemp("documents"), perturb_a_little, **sizes)


@pytest.fixture(scope="module")
def alone(checkpoint):
    """Every document alone, by the CPU platform in fp32."""
    return run(1, run_documents, checkpoint, DocumentCase(compute=FP32, alone=True), platform="cpu")[0]


@pytest.fixture(scope="module")
def rounding(checkpoint, alone):
    """Errors of the CPU platform in bf16."""
    return errors(run(1, run_documents, checkpoint, DocumentCase(compute=BF16), platform="cpu"), alone)


def on_device(checkpoint, ranks: int = 1, **case: object) -> list[dict]:
    return run(ranks, run_documents, checkpoint, DocumentCase(platform="cuda", **case))


@pytest.mark.parametrize("name", CASES)
def test_fp32_as_each_document_alone(name, checkpoint, alone):
    ranks, layout, compute = CASES[name]
    found = errors(on_device(checkpoint, ranks, layout=layout, compute=compute), alone)
    assert max(found.values()) < TOLERANCES.fp32, found


def test_in_half_precision_by_the_fused_kernel(checkpoint, alone, rounding):
    """And what a leak would be: its documents see each other, or one begins a token late."""
    found = errors(on_device(checkpoint, compute=BF16 | SELECTIVE), alone)
    for what in WHAT:
        assert found[what] < 2.0 * rounding[what], found
    for leak in ("mask", "boundary"):
        leaks = errors(on_device(checkpoint, compute=BF16, leak=leak), alone)
        assert all(leaks[what] > 4.0 * rounding[what] for what in WHAT), (leak, leaks)


@pytest.mark.skipif(LOCAL, reason="the local layers have no FP8")
def test_in_fp8(checkpoint, alone, rounding):
    fp8 = FP8Options(fp8_format="hybrid", fp8_recipe="tensorwise")
    found = errors(on_device(checkpoint, compute=BF16 | {"fp8": fp8}), alone)
    assert all(found[what] < 10.0 * rounding[what] for what in WHAT), found


def test_in_local_layers(checkpoint, alone):
    case = DocumentCase(platform="cuda", compute=FP32)
    found = errors(run(1, run_documents, checkpoint, case, platform="local"), alone)
    assert max(found.values()) < TOLERANCES.fp32, found
