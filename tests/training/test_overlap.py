"""Overlapped gradient reduction and parameter gathering: the same run, and nothing stale in a checkpoint."""

import functools

import pytest
import torch

from tests.conversion.helpers import checkpoint_tensors
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, train

OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return make_checkpoint(root), make_data(root)


def test_checkpoints_of_an_overlapped_run_hold_the_last_step(inputs, tmp_path):
    """Rank 0 writes what it has: without waiting for the gather it would write the other rank's share a step late."""
    for name, options in (("plain", {"use_distributed_optimizer": True}), ("overlapped", OVERLAPPED)):
        run = functools.partial(train, inputs[0], tmp_path / name, inputs[1], train_iters=3, save_interval=2, **options)
        rank_pool(2).run(run)
    plain, overlapped = metrics(tmp_path / "plain"), metrics(tmp_path / "overlapped")
    for step, record in plain.items():
        assert overlapped[step]["lm_loss"] == pytest.approx(record["lm_loss"], rel=1e-6)
    for iteration in ("iter_0000002", "iter_0000003"):
        expected = checkpoint_tensors(tmp_path / "plain" / iteration)
        found = checkpoint_tensors(tmp_path / "overlapped" / iteration)
        for key in (key for key in expected if key.startswith("decoder.")):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-7)
