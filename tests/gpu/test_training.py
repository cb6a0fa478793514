"""Training on the device: falling loss, frozen weights, resume, wrong freezes, export, speed and memory."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.model.parameter_kinds import kind_of
from tests.conversion.helpers import checkpoint_tensors
from tests.gpu import device
from tests.gpu.inputs import ROOT, run_ranks
from tests.gpu.ranks import run
from tests.gpu.test_numerics import BF16, RECIPES
from tests.training.runs import metrics, rewind, train

GATHER = {"fp8_param_gather": True}
WAYS = {
    "bf16": {},
    **{f"fp8 {name}": fields for name, fields in RECIPES.items()},
    "fp8 tensorwise, fp8 parameters": RECIPES["tensorwise"] | GATHER,
}
STEPS, SAVED = (8, 4) if device.EMULATED else (50, 25)
CARRIED = ("new experts", "router")


def start(inputs, save: Path, world: int = 1, **changes) -> dict[int, dict]:
    """A run of stage 1 in ranks of a pool; its metrics by step."""
    checkpoint, data = inputs
    fields = {
        "platform": "cuda",
        "fp32": False,
        **BF16,
        "lr": 1e-3,
        "seq_length": 64,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "train_iters": STEPS,
        "save_interval": SAVED,
    }
    run(world, partial(train, **(fields | changes)), checkpoint, save, data)
    return metrics(save)


def report(name: str, ranks: int, records: dict[int, dict]) -> None:
    """On a GPU: add a run to the JSON file of speeds, GPU_REPORT, by default runs/gpu.json."""
    if device.EMULATED:
        return
    path = Path(os.environ.get("GPU_REPORT", ROOT / "runs" / "gpu.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = json.loads(path.read_text()) if path.exists() else []
    last = records[max(records)]
    numbers = {key: value for key, value in last.items() if "second" in key or "memory" in key or "loss" in key}
    entry = {"run": name, "ranks": ranks, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    path.write_text(json.dumps([*entries, entry | numbers], indent=2) + "\n")


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """A run in each way, started once: its directory and metrics."""
    known = {}

    def get(name: str) -> tuple[Path, dict[int, dict]]:
        if name not in known:
            save = tmp_path_factory.mktemp("runs") / "run"
            known[name] = save, start(inputs, save, **WAYS[name])
            report(name, 1, known[name][1])
        return known[name]

    return get


@pytest.mark.parametrize("name", WAYS)
def test_loss_falls_and_original_weights_stay(name, trained, inputs):
    save, records = trained(name)
    losses = [records[step]["lm_loss"] for step in sorted(records)]
    assert losses[-1] < 0.6 * losses[0]
    before, after = checkpoint_tensors(inputs[0]), checkpoint_tensors(save)
    moved = 0
    for key, tensor in before.items():
        rows = after[key][: tensor.shape[0]] if kind_of(key) == "embedding" else after[key]
        if kind_of(key) in CARRIED:
            moved += not torch.equal(rows, tensor.to(rows.dtype))
        else:
            assert torch.equal(rows, tensor.to(rows.dtype)), key
    assert moved


@pytest.mark.parametrize("name", WAYS)
def test_resume_goes_on_with_the_same_losses(name, trained, inputs, tmp_path):
    """To the bit on the emulated device; on GPUs atomic additions change the order of sums."""
    save, whole = trained(name)
    resumed = start(inputs, rewind(save, tmp_path / "again", SAVED), **WAYS[name])
    assert sorted(resumed) == list(range(SAVED + 1, STEPS + 1))
    for step, record in resumed.items():
        for value in ("lm_loss", "grad_norm"):
            expected = whole[step][value] if device.EMULATED else pytest.approx(whole[step][value], rel=1e-3)
            assert record[value] == expected, (step, value)


def test_weights_in_fp8_learn_as_fast(trained):
    """Masters that start rounded would lose small steps, and a step after a save with stale copies would go elsewhere:
    with weights in FP8 every product has the operands it has without."""
    found, expected = (
        [record["lm_loss"] for _, record in sorted(trained(way)[1].items())]
        for way in ("fp8 tensorwise, fp8 parameters", "fp8 tensorwise")
    )
    assert found == (expected if device.EMULATED else pytest.approx(expected, rel=1e-3))


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_resume_at_another_expert_parallel_size(recipe, trained, inputs, tmp_path):
    """The next loss is one rank's: weights, moments and, under delayed scaling, each expert's own scales arrive."""
    if device.count() < 2:
        pytest.skip("needs 2 GPUs")
    save, whole = trained(f"fp8 {recipe}")
    layout = {"expert_model_parallel_size": 2, "train_iters": STEPS}
    resumed = start(inputs, rewind(save, tmp_path / "again", SAVED), 2, **WAYS[f"fp8 {recipe}"], **layout)
    for step, record in resumed.items():
        assert record["lm_loss"] == pytest.approx(whole[step]["lm_loss"], rel=0.01), step


def test_the_commands_of_a_user(inputs, tmp_path):
    """torchrun, two ranks, launch defaults; then evaluation and export of what FP8 trained."""
    world = min(2, device.count())
    checkpoint, data = inputs
    save, exported = tmp_path / "run", tmp_path / "hf"
    fixed = ["--platform", "cuda", "--stage", "1", "--load", checkpoint, "--save", save, "--log-interval", 1, "--bf16"]
    fixed += ["--data-path", data["el"], data["hu"], "--original-languages", "en", "--num-workers", 0, "--lr", 1e-3]
    fixed += ["--train-iters", 4, "--micro-batch-size", 4, "--global-batch-size", 8 * world, "--seq-length", 64]
    fixed += ["--expert-model-parallel-size", world, "--fp8-format", "hybrid", "--fp8-recipe", "delayed"]
    run_ranks(world, "megatron_moe_lpr.pretrain", *fixed)
    losses = [record["lm_loss"] for _, record in sorted(metrics(save).items())]
    assert losses[-1] < 0.8 * losses[0]
    result = tmp_path / "result.json"
    datasets = ["--valid-data-path", data["el"], data["en"], "--original-languages", "en"]
    run_ranks(1, "tools.evaluate", "--load", save, *datasets, "--seq-length", 64, "--output", result)
    by_language = {entry["language"]: entry["loss"] for entry in json.loads(result.read_text())["datasets"]}
    assert by_language["el"] < by_language["en"]
    run_ranks(1, "tools.convert_hf", "export", "--load", save, "--hf", exported)
    assert (exported / "config.json").exists() and list(exported.glob("*.safetensors"))
