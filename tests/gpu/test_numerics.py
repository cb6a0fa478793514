"""Transformer Engine's specification on a GPU against the CPU platform in fp32. Nobody has run this yet.

The tolerances are chosen from the formats (bf16 keeps 8 bits of a number, E4M3 four, E5M2 three), not measured: a run
on a device may show that one is too tight. They bound the norm of the difference over the norm of the reference.
"""

import pytest

from tests.gpu.inputs import compute, relative_error, worst_error

BF16 = {"logits": 0.02, "gradients": 0.06}
FP8 = {"logits": 0.10, "gradients": 0.30}
LOSS = {"bf16": 0.005, "fp8": 0.03}
CASES = {
    "bf16": (("--bf16",), BF16, "bf16"),
    "fp8 delayed": (("--bf16", "--fp8-format", "hybrid", "--fp8-recipe", "delayed"), FP8, "fp8"),
    "fp8 tensorwise": (("--bf16", "--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"), FP8, "fp8"),
    "fp8 blockwise": (("--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise"), FP8, "fp8"),
    "fp8 tensorwise, first and last layer bf16": (
        ("--bf16", "--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--first-last-layers-bf16"),
        FP8,
        "fp8",
    ),
    "recompute full": (("--bf16", "--recompute-granularity", "full"), BF16, "bf16"),
    "recompute moe, fp8": (
        ("--bf16", "--recompute-granularity", "selective", "--recompute-modules", "moe", "--fp8-format", "hybrid"),
        FP8,
        "fp8",
    ),
}


@pytest.fixture(scope="module", params=["1", "2", "full"])
def reference(request, inputs, tmp_path_factory):
    """Stage, and what the CPU platform computes in fp32."""
    out = tmp_path_factory.mktemp("reference") / "cpu.pt"
    return request.param, compute(inputs[0], out, "--platform", "cpu", "--fp32", "--stage", request.param)


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(name, reference, inputs, tmp_path):
    flags, tolerance, loss_kind = CASES[name]
    stage, expected = reference
    found = compute(inputs[0], tmp_path / "cuda.pt", "--platform", "cuda", "--stage", stage, *flags)
    assert relative_error(found["logits"], expected["logits"]) < tolerance["logits"]
    assert relative_error(found["loss"], expected["loss"]) < LOSS[loss_kind]
    worst, error = worst_error(found["gradients"], expected["gradients"])
    assert error < tolerance["gradients"], worst
