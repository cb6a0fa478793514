"""Every family's own parts on the device against the local layers: QK norm, sliding window, head size, rope
scaling, multipliers, norms of outputs, the parallel block, layers without positions."""

import dataclasses
from pathlib import Path

import pytest

from tests.conversion.helpers import rewrite_checkpoint
from tests.conversion.test_mixture_bases import import_mixture
from tests.conversion.tiny_models import COMMON
from tests.gpu import device
from tests.gpu.compute import Step, compute
from tests.gpu.device import TOLERANCES
from tests.gpu.figures import Figures
from tests.gpu.inputs import SIZES, gpu_checkpoint, gradient_error, perturb_a_little, relative_error
from tests.gpu.ranks import run
from tests.gpu.test_numerics import BF16, TENSORWISE
from tests.training.test_second_expansion import change_card

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


def test_sliding_window_over_cp_ranks(tmp_path):
    """Transformer Engine gathers keys and values; without a window it sends them around a ring."""
    if device.count() < 2:
        pytest.skip("needs 2 devices")
    checkpoint = gpu_checkpoint(tmp_path, "mistral")
    step = Step(stage="full", precision=BF16)
    alone = run(1, compute, "cuda", checkpoint, step)[0]
    for found in run(2, compute, "cuda", checkpoint, dataclasses.replace(step, layout={"context_parallel_size": 2})):
        assert relative_error(found["logits"], alone["logits"]) < TOLERANCES.bf16_layout
        assert gradient_error(found["gradients"], alone["gradients"]) < TOLERANCES.bf16_layout


def mixture_checkpoint(root: Path, name: str) -> Path:
    """A mixture of eight experts with four new ones a layer, all of them in use."""
    before = dict(COMMON)
    COMMON.update(SIZES, initializer_range=0.05)
    try:
        checkpoint = import_mixture(root, name, "--add-experts", 4)
    finally:
        COMMON.update(before)
    rewrite_checkpoint(checkpoint, perturb_a_little)
    change_card(checkpoint, openness=1.0)
    return checkpoint


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_a_mixture_base(name, figures, tmp_path):
    """Frozen and trained experts in grouped products of their own; weights that are probabilities or add up to 1."""
    checkpoint = mixture_checkpoint(tmp_path, name)
    exact = run(1, compute, "cpu", checkpoint, Step(precision=FP32), platform="cpu")[0]
    found = run(1, compute, "cuda", checkpoint, Step(precision=FP32))[0]
    assert not any(".base" in key or "shared_experts" in key for key in found["gradients"])
    errors = {"logits": relative_error(found["logits"], exact["logits"])}
    errors["gradients"] = gradient_error(found["gradients"], exact["gradients"])
    figures.add(f"{name}: fp32", **errors)
    assert max(errors.values()) < TOLERANCES.fp32, errors
