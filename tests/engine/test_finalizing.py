"""Gradients over tokens divided on the device, against Megatron's function that asks on the host."""

from unittest.mock import patch

import pytest
import torch
from megatron.core.distributed import finalize_model_grads

from megatron_moe_lpr.engine import finalizing, optimizer
from tests.distributed import rank_pool
from tests.training import one_step
from tests.training.one_step import StepCase, micro_batches, run_step
from tests.training.runs import make_checkpoint

CASES = {
    "EP2": StepCase({"expert_model_parallel_size": 2}),
    "PP2, distributed optimizer": StepCase(
        {"pipeline_model_parallel_size": 2}, optimizer={"use_distributed_optimizer": True}
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("finalizing"))


def both(path, case: StepCase, with_loss: bool) -> list[dict[str, torch.Tensor]]:
    """Gradients by Megatron's function and by ours, on every rank of a pool."""

    def batches(size: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
        return [batch | {"loss_mask": batch["loss_mask"] * with_loss} for batch in micro_batches(size, vocabulary)]

    results = []
    for function in (finalize_model_grads, finalizing.finalize_gradients):
        with patch.object(optimizer, "finalize_gradients", function), patch.object(one_step, "micro_batches", batches):
            results.append(run_step(path, case).gradients)
    return results


@pytest.mark.parametrize("with_loss", [True, False], ids=["tokens", "no tokens"])
@pytest.mark.parametrize("name", CASES)
def test_as_megatron_divides(name, with_loss, checkpoint):
    expected, found = rank_pool(2).run(both, checkpoint, CASES[name], with_loss)[0]
    assert found.keys() == expected.keys()
    assert bool(found) == with_loss
    for key, gradient in expected.items():
        assert torch.equal(found[key], gradient), key
