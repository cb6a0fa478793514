"""Training on the device: falling loss, frozen weights, resume, wrong freezes, export, speed and memory."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.conversion.verification.verify_models import verify_checkpoint
from megatron_moe_lpr.evaluation.checkpoint import EvaluationOptions, evaluate_checkpoint
from megatron_moe_lpr.evaluation.results import evaluation_record
from megatron_moe_lpr.model.configuration.parameter_kinds import kind_of
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from tests.conversion.helpers import checkpoint_tensors
from tests.conversion.helpers import run as convert
from tests.gpu import device
from tests.gpu.device import TOLERANCES
from tests.gpu.inputs import ROOT, run_command, run_ranks
from tests.gpu.ranks import run
from tests.gpu.test_numerics import BF16, RECIPES
from tests.training.runs import metrics, rewind, train

FP32 = {"fp32": True, "bf16": False}
GATHER = {"fp8_param_gather": True}
WAYS = {
    "bf16": {},
    **{f"fp8 {name}": fields for name, fields in RECIPES.items()},
    "fp8 tensorwise, fp8 parameters": RECIPES["tensorwise"] | GATHER,
}
GATHERING = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
STEPS, SAVED = (8, 4) if device.EMULATED else (50, 25)
CARRIED = ("new experts", "router")


def start(inputs, save: Path, world: int = 1, platform: str = "cuda", **changes) -> dict[int, dict]:
    """A run of stage 1 in ranks of a pool of this kind; its metrics by step."""
    checkpoint, data = inputs
    fields = {
        "platform": "cpu" if platform == "cpu" else "cuda",
        "fp32": False,
        **BF16,
        "lr": 1e-3,
        "seq_length": 64,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "train_iters": STEPS,
        "save_interval": SAVED,
    }
    run(world, partial(train, **(fields | changes)), checkpoint, save, data, platform=platform)
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


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_weights_gathered_in_fp8_are_those_gathered_in_bf16(recipe, inputs, tmp_path):
    """Two ranks, each with its share of the optimizer: every product has the operands it has without."""
    if device.count() < 2:
        pytest.skip("needs 2 GPUs")
    short = GATHERING | RECIPES[recipe] | {"train_iters": 3, "save_interval": 2}
    expected, found = (
        [record["lm_loss"] for _, record in sorted(start(inputs, tmp_path / str(name), 2, **short, **gather).items())]
        for name, gather in (("bf16", {}), ("fp8", GATHER))
    )
    assert found == (expected if device.EMULATED else pytest.approx(expected, rel=1e-3))


def test_fused_adam_steps_as_torch_s_adamw(inputs, tmp_path):
    """In fp32: Transformer Engine's optimizer on the device, torch's on the host beside Transformer Engine."""
    fields = FP32 | {"use_distributed_optimizer": True, "train_iters": 4, "weight_decay": 0.1}
    expected, found = (start(inputs, tmp_path / platform, platform=platform, **fields) for platform in ("cpu", "cuda"))
    for value in ("lm_loss", "grad_norm"):
        assert [found[step][value] for step in sorted(found)] == pytest.approx(
            [expected[step][value] for step in sorted(expected)], rel=1e-5 if device.EMULATED else 1e-3
        )
    by_torch, by_engine = checkpoint_tensors(tmp_path / "cpu"), checkpoint_tensors(tmp_path / "cuda")
    for key, before in checkpoint_tensors(inputs[0]).items():
        if kind_of(key) in CARRIED:
            moved = (by_torch[key] - before).norm()
            assert (by_engine[key] - by_torch[key]).norm() < (1e-3 if device.EMULATED else 1e-2) * moved, key


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


def losses_by_language(load: Path, data: dict[str, str], platform: str, **changes) -> dict[str, float]:
    """On every rank: what tools/evaluate.py finds."""
    fields = {"seq_length": 64, "micro_batch_size": 4, "layout": ParallelLayout(), "platform": platform}
    evaluation = evaluate_checkpoint(EvaluationOptions(load, [data["el"], data["en"]], ["en"], **(fields | changes)))
    return {entry["language"]: entry["loss"] for entry in evaluation_record(evaluation)["datasets"]}


def logits_apart(load: Path, hf: Path, dtype: torch.dtype) -> float:
    """On every rank: largest difference between the device's logits of a checkpoint and transformers' of an export."""
    return verify_checkpoint(load, hf, dtype, select_platform("cuda"), sequence_length=64).logits


@pytest.mark.parametrize("name", ["fp8 delayed", "fp8 tensorwise, fp8 parameters", "fp8 blockwise"])
def test_evaluation_and_export_of_what_fp8_trained(name, trained, inputs, tmp_path):
    """A checkpoint with FP8 states is evaluated as the CPU platform does, at another layout too, and exported to a
    stock architecture that transformers computes alike."""
    save, data = trained(name)[0], inputs[1]
    exact = {"fp32": True}
    expected = run(1, partial(losses_by_language, **exact), save, data, "cpu", platform="cpu")[0]
    assert expected["el"] < 0.9 * expected["en"]
    split = name == "fp8 delayed" and device.count() > 1  # the recipe that saves most states
    for layout in [ParallelLayout(), *([ParallelLayout(expert_model_parallel_size=2)] if split else [])]:
        world = layout.expert_model_parallel_size
        found = run(world, partial(losses_by_language, layout=layout, **exact), save, data, "cuda")
        assert found[0] == pytest.approx(expected, rel=10 * TOLERANCES.fp32)
    rounded = run(1, losses_by_language, save, data, "cuda")[0]  # as saved, in bf16
    assert rounded == pytest.approx(expected, rel=TOLERANCES.bf16_layout)
    convert("export", "--load", save, "--hf", tmp_path / "hf")
    assert run(1, logits_apart, save, tmp_path / "hf", torch.float32)[0] < 1e-3


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
    run_command("tools.evaluate", "--load", save, *datasets, "--seq-length", 64, "--output", result)
    by_language = {entry["language"]: entry["loss"] for entry in json.loads(result.read_text())["datasets"]}
    assert by_language["el"] < by_language["en"]
    run_command("tools.convert_hf", "export", "--load", save, "--hf", exported)
    assert (exported / "config.json").exists() and list(exported.glob("*.safetensors"))
