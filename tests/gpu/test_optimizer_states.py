"""Options of the optimizer's state on the device: the same numbers as without, or near ones; save and resume."""

from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.checkpoint.format.reader import CheckpointReader
from megatron_moe_lpr.checkpoint.loading.model import model_shape
from megatron_moe_lpr.engine.state_options import OptimizerStateOptions
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.host_state import host_state
from megatron_moe_lpr.planning.memory import placeholder_bytes, rank_memory
from megatron_moe_lpr.planning.parameters import rank_parameters
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.training.configuration.stages import STAGES
from tests.conversion.helpers import assert_same_tensors, checkpoint_tensors
from tests.gpu import device
from tests.gpu.ranks import run
from tests.gpu.test_training import GATHERING, RECIPES, start
from tests.planning.test_allocations import Case, allocated
from tests.training.runs import rewind

STEPS, SAVED = 4, 2
BITS = {"use_precision_aware_optimizer": True}
BF16_MOMENTS = BITS | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
BF16_GRADIENTS = BITS | {"main_grads_dtype": "bf16"}
HOST = BITS | {"optimizer_cpu_offload": True}
LENGTH = {"train_iters": STEPS, "save_interval": SAVED, "weight_decay": 0.1}
EVERY_STEP = LENGTH | {"save_interval": 1}
NEAR = 2e-3
"""Relative error of losses where a bf16 weight in 2^17 is rounded otherwise: halves upwards, not to even."""
PRECISE = 1e-6 if device.EMULATED else 1e-3


def losses(records: dict[int, dict], value: str = "lm_loss") -> list[float]:
    return [record[value] for _, record in sorted(records.items())]


@pytest.fixture(scope="module")
def ordinary(inputs, tmp_path_factory):
    """A run of each number of ranks with the ordinary optimizer, started once: its directory and metrics."""
    known = {}

    def get(world: int) -> tuple[Path, dict[int, dict]]:
        if world not in known:
            save = tmp_path_factory.mktemp("ordinary") / "run"
            known[world] = save, start(inputs, save, world, **EVERY_STEP, **(GATHERING if world > 1 else {}))
        return known[world]

    return get


def step_tensors(save: Path, iteration: int) -> dict[str, torch.Tensor]:
    return checkpoint_tensors(save / f"iter_{iteration:07d}")


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Weights may differ where half of the fp32 weight's last kept bit was rounded."""
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        differ = tensor != expected[key]
        if differ.any():
            assert tensor.dtype == torch.bfloat16, key
            full = expected[f"optimizer.state.fp32_param.{key}"]
            assert ((full[differ].view(torch.int32) & 0xFFFF) == 0x8000).all(), key


@pytest.mark.parametrize("world", [1, 2])
def test_fp32_weights_in_halves_are_the_ordinary_optimizer_s(world, ordinary, inputs, tmp_path):
    """Every fp32 weight and moment after a step, and every loss, also over ranks that gather weights during the forward
    pass."""
    if device.count() < world:
        pytest.skip(f"needs {world} GPUs")
    save, expected = ordinary(world)
    found = start(inputs, tmp_path / "run", world, **EVERY_STEP, **BITS, **(GATHERING if world > 1 else {}))
    for value in ("lm_loss", "grad_norm"):
        assert losses(found, value)[0] == pytest.approx(losses(expected, value)[0], rel=PRECISE)
    assert losses(found) == pytest.approx(losses(expected), rel=NEAR)
    if device.EMULATED:
        same_tensors(step_tensors(tmp_path / "run", 1), step_tensors(save, 1))


@pytest.mark.parametrize("fields", [BITS, BF16_MOMENTS, BF16_GRADIENTS], ids=["bits", "moments", "gradients"])
def test_resume_goes_on_to_the_bit(fields, inputs, tmp_path):
    save = tmp_path / "run"
    whole = start(inputs, save, **LENGTH, **fields)
    again = rewind(save, tmp_path / "again", SAVED)
    resumed = start(inputs, again, **LENGTH, **fields)
    assert sorted(resumed) == list(range(SAVED + 1, STEPS + 1))
    expected = losses({step: whole[step] for step in resumed})
    assert losses(resumed) == (expected if device.EMULATED else pytest.approx(expected, rel=1e-3))
    if device.EMULATED:
        assert_same_tensors(step_tensors(again, STEPS), step_tensors(save, STEPS))


def optimizer_dtypes(save: Path, iteration: int = STEPS) -> dict[str, set[torch.dtype]]:
    """Dtypes of each state of the optimizer in a checkpoint."""
    found: dict[str, set[torch.dtype]] = {}
    for key, info in CheckpointReader(save / f"iter_{iteration:07d}").tensors.items():
        if key.startswith("optimizer.state."):
            found.setdefault(key.split(".")[2], set()).add(info.dtype)
    return found


@pytest.mark.parametrize("fields", [BF16_MOMENTS, BF16_GRADIENTS], ids=["moments", "gradients"])
def test_bf16_states_train_nearly_alike(fields, ordinary, inputs, tmp_path):
    found = losses(start(inputs, tmp_path / "run", **LENGTH, **fields))
    expected = losses(ordinary(1)[1])
    assert found[0] == pytest.approx(expected[0], rel=PRECISE)
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    moments = torch.bfloat16 if fields is BF16_MOMENTS else torch.float32
    assert optimizer_dtypes(tmp_path / "run") == {
        "exp_avg": {moments},
        "exp_avg_sq": {moments},
        "fp32_param": {torch.float32},
    }


def test_weights_in_fp8_with_bf16_moments(inputs, tmp_path):
    """Megatron then keeps the fp32 weights itself, and FusedAdam the moments alone."""
    way = LENGTH | RECIPES["tensorwise"] | {"fp8_param_gather": True, "use_distributed_optimizer": True}
    expected = losses(start(inputs, tmp_path / "fp32", **way))
    found = start(inputs, tmp_path / "bf16", **way, **BF16_MOMENTS)
    assert losses(found) == pytest.approx(expected, rel=0.02)
    resumed = start(inputs, rewind(tmp_path / "bf16", tmp_path / "again", SAVED), **way, **BF16_MOMENTS)
    whole = losses({step: found[step] for step in resumed})
    assert losses(resumed) == (whole if device.EMULATED else pytest.approx(whole, rel=1e-3))


def test_a_resumed_run_changes_the_state_s_formats_only_by_consent(ordinary, inputs, tmp_path):
    """Where fp32 weights are kept changes nothing; other moments need --accept-changes, and are then rounded."""
    save, whole = ordinary(1)
    expected = losses({step: whole[step] for step in range(SAVED + 1, STEPS + 1)})
    halves = start(inputs, rewind(save, tmp_path / "halves", SAVED), **LENGTH, **BITS)
    assert losses(halves) == pytest.approx(expected, rel=NEAR)
    again = rewind(save, tmp_path / "again", SAVED)
    with pytest.raises(Exception, match="exp_avg_dtype 'fp32' there and 'bf16' here"):
        start(inputs, again, **LENGTH, **BF16_MOMENTS)
    accept = {"accept_changes": ("exp-avg-dtype", "exp-avg-sq-dtype")}
    near = start(inputs, again, **LENGTH, **BF16_MOMENTS, **accept)
    assert losses(near) == pytest.approx(expected, rel=0.02)
    back = start(
        inputs,
        rewind(again, tmp_path / "back", STEPS),
        **(LENGTH | {"train_iters": STEPS + 1}),
        accept_changes=("exp-avg-dtype", "exp-avg-sq-dtype", "train-iters"),
    )
    assert sorted(back) == [STEPS + 1]


@pytest.mark.parametrize("there", [HOST, {}], ids=["from the host", "to the host"])
def test_a_run_moves_its_state_to_the_host_and_back(there, ordinary, inputs, tmp_path):
    save, whole = ordinary(1)
    if there:
        save = tmp_path / "run"
        start(inputs, save, **LENGTH, **there)
    expected = losses({step: whole[step] for step in range(SAVED + 1, STEPS + 1)})
    moved = start(inputs, rewind(save, tmp_path / "again", SAVED), **LENGTH, **({} if there else HOST))
    assert losses(moved) == pytest.approx(expected, rel=NEAR)


@pytest.mark.parametrize("fields", [{}, BITS, BF16_MOMENTS, BF16_GRADIENTS | BF16_MOMENTS], ids=str)
def test_plan_counts_what_the_formats_save(fields, inputs):
    """Gradients and optimizer state of two data-parallel ranks."""
    if device.count() < 2:
        pytest.skip("needs 2 GPUs")
    case = Case({}, states=OptimizerStateOptions(**fields))
    sizes = RunSizes(STAGES["1"].trains, 2, states=case.states)
    planned = PlannedRun(model_shape(resolve_checkpoint(inputs[0])), ParallelLayout(), sizes)
    plan = rank_memory(planned, 0)
    # The first backward pass makes the placeholders.
    parts = {"gradients": plan.gradients - placeholder_bytes(planned, 0), "optimizer": plan.optimizer}
    for found in run(2, allocated, inputs[0], case, "cuda"):
        for part, size in parts.items():
            assert size == pytest.approx(found[part], rel=0.006), part


def test_plan_counts_what_lies_on_the_host(inputs):
    if device.count() < 2:
        pytest.skip("needs 2 GPUs")
    case = Case({}, states=OptimizerStateOptions(**HOST))
    sizes = RunSizes(STAGES["1"].trains, 2, states=case.states)
    planned = PlannedRun(model_shape(resolve_checkpoint(inputs[0])), ParallelLayout(), sizes)
    assert rank_memory(planned, 0).optimizer == 0
    counts = rank_parameters(planned.shape, planned.layout, 0)
    plan = host_state(counts, planned.layout, sizes)
    assert (plan.to_host, plan.gradients) == (plan.state / 3, plan.state / 3)
    assert plan.to_device == pytest.approx(plan.to_host / 2, rel=0.01)
    for found in run(2, allocated, inputs[0], case, "cuda"):
        assert plan.state == pytest.approx(found["optimizer"], rel=0.006)


def test_fp32_refuses_the_precision_aware_optimizer(inputs, tmp_path):
    with pytest.raises(Exception, match="--use-precision-aware-optimizer: needs bf16"):
        start(inputs, tmp_path / "run", **LENGTH, **BITS, bf16=False, fp32=True)


@pytest.mark.parametrize(("world", "overlap"), [(1, False), (2, True)])
def test_states_on_the_host_step_as_on_the_device(world, overlap, ordinary, inputs, tmp_path):
    """Losses, every weight and moment after a step up to the rounding of another AdamW; a resumed run to the bit."""
    if device.count() < world:
        pytest.skip(f"needs {world} GPUs")
    save, expected = ordinary(world)
    fields = HOST | {"overlap_cpu_optimizer_d2h_h2d": overlap} | (GATHERING if world > 1 else {})
    found = start(inputs, tmp_path / "run", world, **EVERY_STEP, **fields)
    assert losses(found) == pytest.approx(losses(expected), rel=NEAR)
    first, second = step_tensors(tmp_path / "run", 1), step_tensors(save, 1)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        if key.startswith("optimizer.state."):
            torch.testing.assert_close(tensor, second[key], rtol=1e-5, atol=1e-7)
    again = rewind(tmp_path / "run", tmp_path / "again", SAVED)
    resumed = start(inputs, again, world, **EVERY_STEP, **fields)
    whole = losses({step: found[step] for step in resumed})
    assert losses(resumed) == (whole if device.EMULATED else pytest.approx(whole, rel=1e-3))
    if device.EMULATED:
        assert_same_tensors(step_tensors(again, STEPS), step_tensors(tmp_path / "run", STEPS))
