"""Transformer Engine's specification on a GPU against the CPU platform in fp32. Nobody has run this yet.

The measure is the CPU platform's own bf16: how far it lies from fp32, in the norm of logits and of all gradients. A GPU
in bf16 may lie twice as far, one in FP8 ten times (E4M3 keeps 4 bits of a number where bf16 keeps 8, with scaling).
The factors are chosen, not measured on a device.
"""

import pytest

from tests.gpu.inputs import compute, gradient_error, relative_error

BF16, FP8 = 2.0, 10.0
FP8_FLAGS = ("--bf16", "--fp8-format", "hybrid", "--fp8-recipe")
CASES = {
    "bf16": (("--bf16",), BF16),
    "fp8 delayed": ((*FP8_FLAGS, "delayed"), FP8),
    "fp8 tensorwise": ((*FP8_FLAGS, "tensorwise"), FP8),
    "fp8 blockwise": (("--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise"), FP8),
    "fp8 tensorwise, first and last layer bf16": ((*FP8_FLAGS, "tensorwise", "--first-last-layers-bf16"), FP8),
    "recompute full": (("--bf16", "--recompute-granularity", "full"), BF16),
    "recompute moe, fp8": (
        (*FP8_FLAGS, "tensorwise", "--recompute-granularity", "selective", "--recompute-modules", "moe"),
        FP8,
    ),
}


def errors(found: dict, expected: dict) -> dict[str, float]:
    return {
        "logits": relative_error(found["logits"], expected["logits"]),
        "gradients": gradient_error(found["gradients"], expected["gradients"]),
    }


@pytest.fixture(scope="module", params=["1", "2", "full"])
def reference(request, inputs, tmp_path_factory):
    """Stage, what the CPU platform computes in fp32, and how far its bf16 lies from that."""
    root, flags = tmp_path_factory.mktemp("reference"), ("--platform", "cpu", "--stage", request.param)
    exact = compute(inputs[0], root / "fp32.pt", *flags, "--fp32")
    return request.param, exact, errors(compute(inputs[0], root / "bf16.pt", *flags, "--bf16"), exact)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(name, reference, inputs, tmp_path):
    flags, factor = CASES[name]
    stage, exact, measure = reference
    found = errors(compute(inputs[0], tmp_path / "cuda.pt", "--platform", "cuda", "--stage", stage, *flags), exact)
    for what, error in found.items():
        assert error < factor * measure[what], f"{what}: {error:.3f}, the CPU's bf16 {measure[what]:.3f}"
