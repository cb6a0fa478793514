"""The reference of the engines: routers that are near a tie are no reference."""

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.serving import reference

SIZES = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3)
    return MixtralForCausalLM(config).eval()


def test_gap_of_second_and_third_expert() -> None:
    """An independent value: a router that reads one feature alone, of rows 3, 2 and 1.5."""
    model = mixtral()
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()
        router = model.model.layers[1].mlp.gate
        router.weight.zero_()
        router.weight[:, 5] = torch.tensor([3.0, 2.0, 1.5])
    hook = router.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, -2)[:, 5]))
    gap = reference.smallest_gap(model, [1, 2, 3, 4])
    hook.remove()
    # The order of the three turns with the sign of the feature.
    wanted = torch.where(seen[0] > 0, 0.5 * seen[0], -seen[0]).min()
    assert gap == pytest.approx(float(wanted), rel=1e-5)


def test_a_router_near_a_tie_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "NEW_TOKENS", 2)
    model = mixtral()
    model.save_pretrained(tmp_path / "apart")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[1:] = model.model.layers[1].mlp.gate.weight[1]
    model.save_pretrained(tmp_path / "tied")
    assert [len(one.tokens) for one in reference.by_transformers(tmp_path / "apart")] == [2, 2]
    with pytest.raises(RuntimeError, match="second and third expert are"):
        reference.by_transformers(tmp_path / "tied")
