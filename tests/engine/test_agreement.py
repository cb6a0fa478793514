"""One read for all ranks: sums, flags, and the request to stop, by whichever rank has it."""

import functools
import signal
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_moe_lpr.engine.agreement import Agreed, agree
from megatron_moe_lpr.engine.micro_batches import LossSums
from megatron_moe_lpr.training.loop import Trainer
from megatron_moe_lpr.training.signals import stop_request
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, train

ASKED_RANK = 1


def agreed_on(losses: list[list[float]], finite: list[bool], asked: list[bool]) -> Agreed:
    """Each argument by rank."""
    rank = dist.get_rank()
    loss = torch.tensor(losses[rank], dtype=torch.float64)
    return agree(LossSums(loss, torch.full_like(loss, 2.0 + rank)), torch.tensor(finite[rank]), asked[rank])


@pytest.mark.parametrize(
    ("losses", "finite", "asked", "not_finite"),
    [
        ([[1.5, 0.1], [2.0, 0.2]], [True, True], [False, False], None),
        ([[1.5, 0.1], [2.0, 0.2]], [True, False], [False, True], "gradient"),
        ([[1.5, float("nan")], [2.0, 0.2]], [True, True], [True, True], "loss"),
        ([[1.5, 0.1], [float("inf"), 0.2]], [False, False], [True, False], "loss"),
    ],
)
def test_every_rank_hears_the_same(losses, finite, asked, not_finite):
    for agreed in rank_pool(2).run(agreed_on, losses, finite, asked):
        expected = torch.tensor(losses, dtype=torch.float64).sum(0)
        assert torch.equal(agreed.sums.loss.nan_to_num(), expected.nan_to_num())
        assert agreed.sums.tokens.tolist() == [5.0, 5.0]
        assert agreed.gradients_finite == all(finite)
        assert agreed.asked_to_stop == any(asked)
        assert agreed.not_finite == not_finite


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("agreement")
    return make_checkpoint(root), make_data(root)


def asked_in(method: str, *arguments, **changes) -> bool:
    """Train while one rank receives a signal as step 2 enters `method`; whether the run was finished."""
    original = getattr(Trainer, method)

    def entered(trainer, *given):
        step = trainer.state.iteration + (1 if method == "step" else 0)
        if dist.get_rank() == ASKED_RANK and step == 2:
            trainer.stop.received = signal.SIGTERM
        return original(trainer, *given)

    with patch.object(Trainer, method, entered):
        try:
            return train(*arguments, **changes)
        finally:
            stop_request().received = None


@pytest.mark.parametrize("method", ["step", "save", "evaluate"])
def test_all_stop_behind_the_step_in_which_one_was_asked(method, inputs, tmp_path):
    """Also where the signal comes while a checkpoint is written or the model evaluated."""
    save = tmp_path / "run"
    evaluates = {"eval_interval": 2, "valid_data_path": [inputs[1]["el"]]}
    changes = {"save": {"save_interval": 2}, "evaluate": evaluates}.get(method, {})
    task = functools.partial(asked_in, method, inputs[0], save, inputs[1], train_iters=5, **changes)
    assert rank_pool(2).run(task) == [False, False]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert sorted(metrics(save)) == [1, 2]
