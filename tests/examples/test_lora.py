"""The LoRA row of the table: linear layers change by a low rank and nothing else changes, on a training's windows."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.errors import UserError
from tests.conversion.tiny_models import load_model, save_model
from tests.training.runs import make_data

pytest.importorskip("peft", reason="needs peft")
sys.path.append(str(Path(__file__).parents[2] / "examples" / "demo"))
import costs
import lora

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, list]:
    """Return the dense model, the model with the adapters added, and the batches."""
    root = tmp_path_factory.mktemp("lora")
    dense = save_model("qwen2-tied", root / "dense")
    make_data(root)
    seen, lm_loss = [], lora.lm_loss

    def remembered(model, batch, bf16):
        loss = lm_loss(model, batch, bf16)
        seen.append(loss.item())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "lm_loss", remembered)
        run(root, "tuned")
    return dense, root / "tuned", seen


def run(root: Path, save: str, *more: object) -> None:
    """Train 20 steps to ROOT/SAVE."""
    arguments = ["--hf", root / "dense", "--save", root / save, "--data-path", root / "el", root / "hu"]
    arguments += ["--train-iters", 20, "--global-batch-size", 4, "--seq-length", 32, "--lr", 0.02, "--rank", RANK]
    lora.main([str(word) for word in (*arguments, "--log-interval", 5, *more)])


def test_the_difference_has_the_adapters_rank(trained) -> None:
    before, after = (load_model(directory).state_dict() for directory in trained[:2])
    for name, weight in before.items():
        difference = after[name].double() - weight.double()
        if name.split(".")[-2] in LINEAR and name.endswith("weight"):
            values = torch.linalg.svdvals(difference)
            assert values[RANK - 1] > 1e-4 and values[RANK] < 1e-5 * values[0], name
        else:
            assert not difference.any(), name


def test_it_learns_and_keeps_the_tokenizer(trained) -> None:
    dense, tuned, losses = trained
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.3
    assert (tuned / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


def test_an_interrupted_run_goes_on_from_its_state(trained, monkeypatch, capsys) -> None:
    root, steps, lm_loss = trained[0].parent, iter(range(1, 30)), lora.lm_loss
    state = ("--state", root / "state.pt", "--save-interval", 6)

    def interrupted(*arguments):
        if next(steps) == 9:
            raise KeyboardInterrupt
        return lm_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(lora, "lm_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(root, "resumed", *state)
    assert not (root / "resumed").exists() and (root / "state.pt").exists()
    with pytest.raises(UserError, match=r"state\.pt"):
        run(root, "resumed", *state, "--rank", 3)
    capsys.readouterr()
    run(root, "resumed", *state)
    assert "goes on after step 6" in capsys.readouterr().out and not (root / "state.pt").exists()
    whole, resumed = (load_model(root / name).state_dict() for name in ("tuned", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    lines = [json.loads(line) for line in (root / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [5, 6, 10, 12, 15, 18, 20]
    assert [line["consumed_tokens"] for line in lines] == [4 * 32 * line["iteration"] for line in lines]
    losses = [
        sum(trained[2][start:end]) / (end - start) for start, end in itertools.pairwise((0, 5, 6, 10, 12, 15, 18, 20))
    ]
    assert [line["lm_loss"] for line in lines] == pytest.approx(losses)


def test_active_parameters_of_a_mixture() -> None:
    """With the top 2 of 4 experts, half of the experts' parameters are active."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    experts = 2 * 4 * 3 * 16 * 24
    assert costs.active_parameters(model) == model.num_parameters() - experts // 2
