"""Steps whose loss or gradient is not finite: left out on all ranks alike, or the end of the run."""

import functools

import pytest
import torch
import torch.distributed as dist

from megatron_moe_lpr.engine.micro_batches import LossSums
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.training import loop
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, train

POISON_RANK = 1


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("finite")
    return make_checkpoint(root), make_data(root)


def poisoned(what: str, steps: tuple[int, ...], *arguments, **changes):
    """Train with NaN in the loss of every rank, or in one gradient of one rank alone, in some steps.

    Returns the error or None, and by step whether weights, masters and moments were changed by it.
    """
    changed: dict[int, bool] = {}
    original_schedule, original_step = loop.run_micro_batches, loop.Trainer.step

    def schedule(chunks, *rest, **named):
        sums = original_schedule(chunks, *rest, **named)
        step = current.state.iteration + 1
        if step not in steps or named.get("forward_only"):
            return sums
        if what == "loss":
            return LossSums(sums.loss * float("nan"), sums.tokens)
        if dist.get_rank() == POISON_RANK:
            parameters = [parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad]
            parameters[0].main_grad.view(-1)[:] = float(what)
        return sums

    def step(trainer, iterator):
        nonlocal current
        current = trainer
        before = state_of(trainer)
        original_step(trainer, iterator)
        changed[trainer.state.iteration] = any(
            not torch.equal(old, new) for old, new in zip(before, state_of(trainer), strict=False)
        )

    current = None
    loop.run_micro_batches, loop.Trainer.step = schedule, step
    try:
        train(*arguments, **changes)
    except UserError as error:
        return str(error), changed
    finally:
        loop.run_micro_batches, loop.Trainer.step = original_schedule, original_step
    return None, changed


def state_of(trainer) -> list[torch.Tensor]:
    """Everything a step may change on this rank."""
    tensors = [parameter.detach().clone() for chunk in trainer.state.chunks for parameter in chunk.parameters()]
    for optimizer in getattr(trainer.state.optimizer, "chained_optimizers", [trainer.state.optimizer]):
        inner = getattr(optimizer, "optimizer", None)
        if inner is not None:
            tensors += [main.detach().clone() for group in inner.param_groups for main in group["params"]]
            values = (value for state in inner.state.values() for value in state.values())
            tensors += [value.clone() for value in values if isinstance(value, torch.Tensor)]
    return tensors


LAYOUTS = {
    "fp32, DP2": {},
    "fp32, EP2, distributed": {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
    "bf16, DP2": {"fp32": False, "bf16": True},
    "fp32, TP2, no clipping": {"tensor_model_parallel_size": 2, "clip_grad": 0.0},
    "bf16, PP2": {"fp32": False, "bf16": True, "pipeline_model_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(layout, inputs, tmp_path):
    """The batch is used up, nothing else has changed, and the next step is taken."""
    what = "inf" if "TP2" in layout else "nan"
    task = functools.partial(
        poisoned, what, (3,), *(inputs[0], tmp_path / "run", inputs[1]), on_nonfinite="skip", train_iters=5,
        **LAYOUTS[layout],
    )  # fmt: skip
    for error, changed in rank_pool(2).run(task):
        assert error is None
        assert changed == {1: True, 2: True, 3: False, 4: True, 5: True}
    assert sorted(metrics(tmp_path / "run")) == [1, 2, 4, 5]
    assert metrics(tmp_path / "run", "skipped")[3]["reason"] == "gradient"
    assert metrics(tmp_path / "run")[5]["consumed_samples"] == 40


def test_so_many_losses_in_a_row_and_no_more(inputs, tmp_path):
    arguments = (inputs[0], tmp_path / "run", inputs[1])
    options = {"on_nonfinite": "skip", "max_consecutive_skips": 2, "train_iters": 8}
    task = functools.partial(poisoned, "loss", (2, 3, 5, 6, 7), *arguments, **options)
    for error, changed in rank_pool(2).run(task):
        assert error.startswith("step 7: the loss is not finite")
        assert changed == {1: True, 2: False, 3: False, 4: True, 5: False, 6: False}


@pytest.mark.parametrize("what", ["loss", "nan"])
def test_without_the_flag_the_first_one_ends_the_run(what, inputs, tmp_path):
    task = functools.partial(poisoned, what, (2,), inputs[0], tmp_path / "run", inputs[1], clip_grad=0.0)
    for error, changed in rank_pool(2).run(task):
        assert error.startswith("step 2: ") and "not finite" in error
        assert changed == {1: True}
