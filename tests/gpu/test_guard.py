"""The first step's check of gradients where Transformer Engine ignores a freeze without a word."""

from pathlib import Path

import pytest

from megatron_moe_lpr.errors import UserError
from tests.gpu.compute import Step, compute
from tests.gpu.ranks import run
from tests.gpu.test_numerics import BF16, RECIPES


def error_of(platform: str, checkpoint: Path, step: Step) -> str | None:
    """On every rank: the error that ends the step, if one does."""
    try:
        compute(platform, checkpoint, step)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("recipe", [None, "tensorwise"])
@pytest.mark.parametrize(("frozen", "caught"), [("experts.linear_fc1.weight0", True), ("linear_fc1.weight2", False)])
def test_a_freeze_inside_the_group(frozen, caught, recipe, inputs):
    """It looks at a group's first weight alone: frozen, none of the group trains. Any other expert may be frozen."""
    step = Step(precision=BF16, fp8=RECIPES.get(recipe, {}), frozen_by_mistake=frozen)
    message = run(1, error_of, "cuda", inputs[0], step)[0]
    if not caught:
        assert message is None
        return
    # Of each of four layers the three other experts' first matrices.
    assert "12 trainable parameters got no gradient in the first step" in message
    for expert in (1, 2, 3):
        assert f"decoder.layers.0.mlp.experts.linear_fc1.weight{expert}" in message


def test_the_same_freeze_is_harmless_on_the_cpu(inputs):
    step = Step(precision={"fp32": True}, frozen_by_mistake="experts.linear_fc1.weight0")
    assert run(1, error_of, "cpu", inputs[0], step, platform="cpu")[0] is None
