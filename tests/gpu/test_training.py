"""Training on GPUs by the real command: falling loss in FP8, resume, frozen weights, speed and memory.

Nobody has run this yet.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.model.parameter_kinds import kind_of
from tests.conversion.helpers import checkpoint_tensors
from tests.gpu.inputs import ROOT, run_ranks
from tests.training.runs import metrics, rewind

BF16 = ("--bf16",)
FP8 = (*BF16, "--fp8-format", "hybrid", "--fp8-recipe")
WAYS = {
    "bf16": BF16,
    "fp8 delayed": (*FP8, "delayed"),
    "fp8 tensorwise": (*FP8, "tensorwise"),
    "fp8 blockwise": (*FP8, "blockwise"),
    "fp8 tensorwise, fp8 parameters": (*FP8, "tensorwise", "--fp8-param-gather"),
}
STEPS = 50


def train(inputs, save: Path, *flags: object, ranks: int = 1, steps: int = STEPS) -> dict[int, dict]:
    """A run of `megatron_moe_lpr.pretrain`, stage 1; its metrics by step."""
    checkpoint, data = inputs
    fixed = ["--platform", "cuda", "--stage", "1", "--load", checkpoint, "--save", save, "--log-interval", 1]
    fixed += ["--data-path", data["el"], data["hu"], "--original-languages", "en", "--num-workers", 0, "--lr", 1e-3]
    fixed += ["--train-iters", steps, "--micro-batch-size", 4, "--global-batch-size", 8 * ranks, "--seq-length", 64]
    run_ranks(ranks, "megatron_moe_lpr.pretrain", *fixed, *flags)
    return metrics(save)


def report(name: str, ranks: int, records: dict[int, dict]) -> None:
    """Add a run to the JSON file of speeds: GPU_REPORT, by default runs/gpu.json."""
    path = Path(os.environ.get("GPU_REPORT", ROOT / "runs" / "gpu.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = json.loads(path.read_text()) if path.exists() else []
    last = records[max(records)]
    numbers = {key: value for key, value in last.items() if "second" in key or "memory" in key or "loss" in key}
    entry = {"run": name, "ranks": ranks, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    path.write_text(json.dumps([*entries, entry | numbers], indent=2) + "\n")


@pytest.mark.parametrize("name", WAYS)
def test_loss_falls_and_original_weights_stay(name, inputs, tmp_path):
    records = train(inputs, tmp_path / "run", *WAYS[name])
    report(name, 1, records)
    losses = [records[step]["lm_loss"] for step in sorted(records)]
    assert sum(losses[-5:]) / 5 < 0.9 * sum(losses[:5]) / 5
    before, after = checkpoint_tensors(inputs[0]), checkpoint_tensors(tmp_path / "run")
    for key, tensor in before.items():
        if kind_of(key) not in ("router", "new experts"):
            assert torch.equal(after[key], tensor.to(after[key].dtype)), key


def test_all_gpus_of_the_node(inputs, tmp_path):
    """Data and expert parallelism with every launch default on."""
    ranks = torch.cuda.device_count()
    if ranks < 2:
        pytest.skip("needs 2 GPUs")
    size = 4 if ranks % 4 == 0 else 2 if ranks % 2 == 0 else 1
    records = train(inputs, tmp_path / "run", *BF16, "--expert-model-parallel-size", size, ranks=ranks)
    report(f"bf16, EP{size}", ranks, records)
    losses = [records[step]["lm_loss"] for step in sorted(records)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["bf16", "fp8 tensorwise"])
def test_resume_goes_on_with_the_same_losses(name, inputs, tmp_path):
    """Tensorwise scaling keeps no history; the recipe delayed does, in `_extra_state`."""
    whole = train(inputs, tmp_path / "whole", *WAYS[name], "--save-interval", 3, steps=6)
    resumed = train(inputs, rewind(tmp_path / "whole", tmp_path / "again", 3), *WAYS[name], steps=6)
    assert sorted(resumed) == [4, 5, 6]
    for step, record in resumed.items():
        assert record["lm_loss"] == pytest.approx(whole[step]["lm_loss"], rel=1e-3), step
