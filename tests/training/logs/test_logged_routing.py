"""Routing in the log: of the step that is logged, whatever the interval; the LM loss is the interval's."""

import math

import pytest

from megatron_moe_lpr.pretrain import pretrain
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, training_config

ROUTING = ("load_balancing_loss", "lpr_loss", "expert0_")


def train(checkpoint, save, data, log_interval):
    pretrain(training_config(checkpoint, save, data, stage="2", train_iters=4, log_interval=log_interval))


def test_routing_is_the_last_steps_and_the_loss_the_intervals(tmp_path):
    checkpoint, data = make_checkpoint(tmp_path), make_data(tmp_path)
    for interval in (1, 2):
        rank_pool(1).run(train, checkpoint, tmp_path / str(interval), data, interval)
    every, second = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert sorted(second) == [2, 4]
    for step, found in second.items():
        names = [name for name in found if name.startswith(ROUTING)]
        assert len(names) > 4 and all(math.isfinite(found[name]) for name in names)
        assert {name: found[name] for name in names} == {name: every[step][name] for name in names}
        assert found["lm_loss"] == pytest.approx((every[step - 1]["lm_loss"] + every[step]["lm_loss"]) / 2, rel=1e-6)
