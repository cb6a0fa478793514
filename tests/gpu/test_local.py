"""Layers of PyTorch alone on the device, without Transformer Engine: against the CPU platform, and in every layout."""

from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.moe import grouped_product
from megatron_moe_lpr.model.moe.grouped_product import grouped_mm
from megatron_moe_lpr.platform import select_platform
from tests.conversion.helpers import checkpoint_tensors
from tests.gpu import device
from tests.gpu.compute import Step, compute
from tests.gpu.device import TOLERANCES
from tests.gpu.inputs import gpu_checkpoint, gradient_error, relative_error
from tests.gpu.ranks import run
from tests.gpu.test_layouts import EP2, INTERLEAVED, OVERLAPPED, TP2
from tests.gpu.test_numerics import BF16, FULL, MOE, RECIPES, SELECTIVE, SHARDED
from tests.gpu.test_training import SAVED, STEPS, start
from tests.training.runs import rewind

FP32 = {"fp32": True}
LAYOUTS = {
    "DP2": (2, Step(precision=FP32, optimizer=OVERLAPPED)),
    "TP2xEP2, recompute full": (2, Step(precision=FP32 | FULL, layout=TP2 | EP2)),
    "stage 2, TP2xEP2": (2, Step(stage="2", precision=FP32, layout=TP2 | EP2)),
    "full training, PP2 interleaved": (2, Step(stage="full", precision=FP32, layout=INTERLEAVED)),
    "bf16, EP2": (2, Step(precision=BF16, layout=EP2, optimizer=OVERLAPPED)),
    "bf16, TP2+SP": (2, Step(precision=BF16, layout=TP2, optimizer=OVERLAPPED)),
    "stage 2, bf16, EP2, overlap": (2, Step("2", precision=BF16 | {"original_expert_overlap": True}, layout=EP2)),
}
local = partial(run, platform="local")


def how_it_computes() -> dict[str, object]:
    """On a rank: what the platform says, and the optimizer that Megatron would build."""
    from megatron.core import optimizer

    platform = select_platform("cuda")
    return {
        "engine": platform.transformer_engine,
        "note": platform.note,
        "grouped": platform.gpu.grouped_products,
        "optimizer": optimizer.Adam.__module__,
    }


def test_it_is_chosen_where_transformer_engine_is_missing():
    found = local(1, how_it_computes)[0]
    assert not found["engine"]
    assert found["optimizer"] == "megatron_moe_lpr.platform.torch_only.optimizer"
    if device.EMULATED:
        assert "layers are of PyTorch alone (--transformer-impl local); slower are the router" in found["note"]
        assert found["grouped"]


@pytest.mark.parametrize("stage", ["1", "2", "full"])
def test_logits_and_gradients(stage, inputs):
    """In fp32 those of the CPU platform, in bf16 at most twice as far from them as the CPU platform's bf16."""
    exact, rounded = (
        run(1, compute, "cpu", inputs[0], Step(stage, precision), platform="cpu")[0] for precision in (FP32, BF16)
    )
    for precision in (FP32, BF16):
        found = local(1, compute, "cuda", inputs[0], Step(stage, precision))[0]
        for what, error in (("logits", relative_error), ("gradients", gradient_error)):
            limit = TOLERANCES.fp32 if precision == FP32 else 2.0 * error(rounded[what], exact[what])
            assert error(found[what], exact[what]) < limit, what


@pytest.mark.parametrize("recompute", [FULL, MOE, SELECTIVE], ids=["full", "moe", "selective"])
def test_recompute_changes_no_bit_of_the_forward_pass(recompute, inputs):
    plain, again = (local(1, compute, "cuda", inputs[0], Step(precision=BF16 | more))[0] for more in ({}, recompute))
    assert torch.equal(plain["logits"], again["logits"])
    assert gradient_error(again["gradients"], plain["gradients"]) < TOLERANCES.fp32


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_parts_of_other_families(family, tmp_path):
    """QK norm; a sliding window, whose mask must lie on the device."""
    checkpoint = gpu_checkpoint(tmp_path, family)
    exact = run(1, compute, "cpu", checkpoint, Step(precision=FP32), platform="cpu")[0]
    found = local(1, compute, "cuda", checkpoint, Step(precision=FP32))[0]
    assert relative_error(found["logits"], exact["logits"]) < TOLERANCES.fp32
    assert gradient_error(found["gradients"], exact["gradients"]) < TOLERANCES.fp32


@pytest.fixture(scope="module")
def one_rank(inputs):
    known = {}

    def get(step: Step) -> dict:
        alone = Step(**(vars(step) | {"layout": {}, "optimizer": {}}))
        if repr(alone) not in known:
            known[repr(alone)] = local(1, compute, "cuda", inputs[0], alone)[0]
        return known[repr(alone)]

    return get


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name, one_rank, inputs):
    world, step = LAYOUTS[name]
    if device.count() < world:
        pytest.skip(f"needs {world} GPUs")
    expected, found = one_rank(step), local(world, compute, "cuda", inputs[0], step)[0]
    limit = TOLERANCES.bf16_layout if "bf16" in step.precision else TOLERANCES.fp32
    assert relative_error(found["logits"], expected["logits"]) < limit
    assert gradient_error(found["gradients"], expected["gradients"]) < limit
    whole = torch.cat([gradient.flatten() for gradient in found["gradients"].values()])
    assert found["norm"] == pytest.approx(whole.double().norm().item(), rel=1e-4)


def grouped_products(checkpoint: Path, step: Step) -> int:
    """On a rank: how many products of several experts a step computes in one launch."""
    calls = []
    with patch.object(grouped_product, "grouped_mm", lambda *given: (calls.append(1), grouped_mm(*given))[1]):
        compute("cuda", checkpoint, step)
    return len(calls)


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [("1", BF16, 2 * 4 * (1 + 4)), ("2", BF16, 2 * 4 * (1 + 4 + 4) - 4), ("1", FP32, 0)],
)
def test_products_in_one_launch(stage, precision, expected, inputs):
    """Two matrices of each of four layers. Of logits the products, in every stage: nothing trains yet. Then of four
    micro-batches: in stage 1 the weights' gradients, the weights themselves lie in the optimizer's buffer; in stage 2
    the products and the input's gradients, which the lowest layer needs of its second matrix alone."""
    if not device.EMULATED and not local(1, how_it_computes)[0]["grouped"]:
        pytest.skip("PyTorch has no grouped product for this device")
    found = local(1, grouped_products, inputs[0], Step(stage, precision, optimizer=SHARDED))[0]
    assert found == expected


def refusal(checkpoint: Path, step: Step) -> str | None:
    """On a rank: the error that ends the step, if one does."""
    try:
        compute("cuda", checkpoint, step)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_refused(recipe, inputs):
    message = local(1, refusal, inputs[0], Step(precision=BF16, fp8=RECIPES[recipe]))[0]
    assert message is not None
    assert message.startswith("--fp8-format needs the layers of Transformer Engine")


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """A run of stage 1 in bf16: its directory and metrics."""
    save = tmp_path_factory.mktemp("local") / "run"
    return save, start(inputs, save, platform="local")


def test_training_and_resume(trained, inputs, tmp_path):
    """To the bit on the emulated device; on GPUs atomic additions change the order of sums."""
    save, whole = trained
    losses = [record["lm_loss"] for _, record in sorted(whole.items())]
    assert losses[-1] < 0.6 * losses[0]
    resumed = start(inputs, rewind(save, tmp_path / "again", SAVED), platform="local")
    assert sorted(resumed) == list(range(SAVED + 1, STEPS + 1))
    for step, record in resumed.items():
        for value in ("lm_loss", "grad_norm"):
            expected = whole[step][value] if device.EMULATED else pytest.approx(whole[step][value], rel=1e-3)
            assert record[value] == expected, (step, value)


@pytest.mark.skipif(device.LOCAL, reason="needs Transformer Engine")
def test_a_run_goes_on_with_and_without_transformer_engine(trained, inputs, tmp_path):
    """Either continues what the other has saved, optimizer included: the next losses are the other's up to rounding."""
    save, whole = trained
    by_engine = start(inputs, tmp_path / "engine")
    for platform, source, expected in (("cuda", save, whole), ("local", tmp_path / "engine", by_engine)):
        resumed = start(inputs, rewind(source, tmp_path / platform, SAVED), platform=platform)
        assert sorted(resumed) == list(range(SAVED + 1, STEPS + 1))
        for step, record in resumed.items():
            assert record["lm_loss"] == pytest.approx(expected[step]["lm_loss"], rel=0.02), step


def test_two_ranks_train_as_one_in_fp32(inputs, tmp_path):
    """torch's AdamW on each rank's share of the state steps as it does on the CPU platform."""
    if device.count() < 2:
        pytest.skip("needs 2 GPUs")
    fields = {"fp32": True, "bf16": False, "train_iters": 3, "weight_decay": 0.1, "use_distributed_optimizer": True}
    expected = start(inputs, tmp_path / "cpu", platform="cpu", **fields)
    found = start(inputs, tmp_path / "local", 2, platform="local", expert_model_parallel_size=2, **fields)
    for step, record in expected.items():
        for value in ("lm_loss", "grad_norm"):
            assert found[step][value] == pytest.approx(record[value], rel=1e-5 if device.EMULATED else 1e-3), step
    before = checkpoint_tensors(inputs[0])
    by_cpu, by_device = checkpoint_tensors(tmp_path / "cpu"), checkpoint_tensors(tmp_path / "local")
    for key in before:
        weight = by_cpu[key]
        rows = min(len(weight), len(before[key]))  # of an embedding without the padding
        moved = (weight[:rows] - before[key][:rows].to(weight.dtype)).norm()
        assert (by_device[key] - weight)[:rows].norm() <= (1e-3 if device.EMULATED else 1e-2) * moved, key
