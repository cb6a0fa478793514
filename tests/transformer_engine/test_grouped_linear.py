"""Gradients of the new experts through Transformer Engine's own grouped linear function, and a freeze that fools it."""

import pytest
import torch

from tests.conversion.helpers import perturb, rewrite_checkpoint, run
from tests.conversion.tiny_models import save_model
from tests.transformer_engine import grouped
from tests.transformer_engine.ranks import ranks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny upcycled model in fp32 with five different experts a layer."""
    root = tmp_path_factory.mktemp("grouped")
    save_model("qwen2", root / "hf")
    run("import", "--hf", root / "hf", "--save", root / "moe", "--num-experts", 5)
    rewrite_checkpoint(root / "moe", perturb)
    return root / "moe"


@pytest.mark.parametrize("stage", ["1", "2"])
def test_gradients_equal_the_local_specification(stage, checkpoint):
    """In stage 1 every new expert has one, zeros where it had no token; in stage 2 only the input has."""
    local, engine = (ranks(kind, 1).run(grouped.expert_gradients, checkpoint, stage)[0] for kind in (False, True))
    assert local.keys() == engine.keys()
    assert len(engine) == 2 + 4 * 2
    for name, gradient in engine.items():
        if stage == "2" and name not in ("output", "input"):
            assert gradient is None and local[name] is None
            continue
        torch.testing.assert_close(gradient, local[name], rtol=1e-5, atol=1e-6)
        assert gradient.abs().sum() > 0 or name.endswith("weight1")


def test_every_expert_s_weight_is_marked_as_split(checkpoint):
    """By Transformer Engine 2.11 itself; by newer versions no longer."""
    assert ranks(True, 1).run(grouped.unmarked_weights, checkpoint)[0] == []


@pytest.mark.parametrize("frozen_expert", [None, 3])
def test_the_guard_is_silent_where_every_gradient_arrives(frozen_expert, checkpoint):
    assert ranks(True, 1).run(grouped.watch_wrong_freeze, checkpoint, frozen_expert)[0] is None


def test_first_expert_frozen_inside_the_group_is_caught(checkpoint):
    """Transformer Engine looks at the first weight alone: frozen, it stops the whole group without a word."""
    message = ranks(True, 1).run(grouped.watch_wrong_freeze, checkpoint, 0)[0]
    print(message)
    assert "6 trainable parameters got no gradient in the first step" in message
    for expert in (1, 2, 3):
        assert f"decoder.layers.0.mlp.experts.linear_fc1.weight{expert}" in message
    # The same freeze is harmless in the local specification.
    assert ranks(False, 1).run(grouped.watch_wrong_freeze, checkpoint, 0)[0] is None
