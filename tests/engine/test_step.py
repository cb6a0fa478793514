"""A training step, written out, changes the weights to the same bits as Megatron's own `ChainedOptimizer.step`."""

import pytest
import torch

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.engine.micro_batches import run_micro_batches
from megatron_moe_lpr.engine.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from megatron_moe_lpr.engine.options import BatchOptions, OptimizerOptions
from megatron_moe_lpr.engine.step import TrainingState, training_step
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import MoELPRConfig
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES, freeze
from tests.distributed import rank_pool
from tests.training.one_step import LANGUAGE_GROUP, SAMPLES, micro_batches
from tests.training.runs import make_checkpoint

STEPS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("step"))


def build(path, layout: dict, dtype: torch.dtype, clip_grad: float) -> tuple[TrainingState, MoELPRConfig]:
    """A model, its optimizer and schedule at any layout, and its configuration."""
    platform, parallel = select_platform("cpu"), ParallelLayout(**layout)
    initialize_parallel(platform, parallel)
    losses = {"load_balancing_coeff": 0.3, "calculate_per_token_loss": True}
    model = load_model(path, parallel, platform, ComputeOptions().with_dtype(dtype), **losses)
    freeze(model.chunks, STAGES["1"])
    options = OptimizerOptions(lr=1e-2, clip_grad=clip_grad, use_distributed_optimizer=dtype == torch.bfloat16)
    chunks = wrap_data_parallel(model.chunks, model.config, options)
    optimizer = build_optimizer(chunks, model.config, options, platform)
    schedule = build_schedule(optimizer, options, BatchOptions(train_iters=10, global_batch_size=SAMPLES))
    return TrainingState(chunks, optimizer, schedule), model.config


def megatrons_step(state: TrainingState, config: MoELPRConfig) -> float:
    """The same step with Megatron's own optimizer step; the norm of the gradients."""
    for chunk in state.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    run_micro_batches(state.chunks, config, micro_batches(2), LANGUAGE_GROUP)
    updated, grad_norm, _ = state.optimizer.step()
    assert updated
    state.schedule.step(increment=SAMPLES)
    return float(grad_norm)


def both(*case) -> tuple[list[float], list[float], bool, set[str]]:
    """On a rank: gradient norms of Megatron's steps and of ours, whether all weights are equal, replaced methods."""
    reference, config = build(*case)
    expected = [megatrons_step(reference, config) for _ in range(STEPS)]
    weights = [parameter.detach().clone() for chunk in reference.chunks for parameter in chunk.parameters()]
    state, _ = build(*case)
    methods = set(vars(state.optimizer))
    results = [training_step(state, micro_batches(2), LANGUAGE_GROUP, SAMPLES) for _ in range(STEPS)]
    found = [parameter.detach() for chunk in state.chunks for parameter in chunk.parameters()]
    equal = all(torch.equal(one, other) for one, other in zip(weights, found, strict=True))
    return expected, [result.grad_norm for result in results], equal, set(vars(state.optimizer)) - methods


@pytest.mark.parametrize("clip_grad", [0.0, 0.01], ids=["no clipping", "clipped"])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [({"expert_model_parallel_size": 2}, torch.float32), ({"pipeline_model_parallel_size": 2}, torch.bfloat16)],
    ids=["fp32, EP2", "bf16, PP2"],
)
def test_the_same_bits_as_megatrons_step(layout, dtype, clip_grad, checkpoint):
    for expected, found, equal, replaced in rank_pool(2).run(both, checkpoint, layout, dtype, clip_grad):
        assert found == expected and min(expected) > clip_grad
        assert equal
        assert not replaced  # nothing is put in the place of the optimizer's methods


def skipped(path, layout: dict) -> tuple[str | None, bool, float]:
    """On a rank: a step with a loss that is not finite: what is not finite, whether a weight changed, the rate."""
    state, _ = build(path, layout, torch.float32, 1.0)
    training_step(state, micro_batches(2), LANGUAGE_GROUP, SAMPLES)
    before = [parameter.detach().clone() for chunk in state.chunks for parameter in chunk.parameters()]
    rate = state.optimizer.param_groups[0]["lr"]
    batches = micro_batches(2)
    batches[0]["loss_mask"] = batches[0]["loss_mask"] * torch.nan
    result = training_step(state, batches, LANGUAGE_GROUP, SAMPLES)
    after = [parameter for chunk in state.chunks for parameter in chunk.parameters()]
    changed = any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    return result.agreed.not_finite, changed, state.optimizer.param_groups[0]["lr"] - rate


def test_a_step_that_is_not_finite_changes_neither_weights_nor_learning_rate(checkpoint):
    assert rank_pool(2).run(skipped, checkpoint, {"expert_model_parallel_size": 2}) == [("loss", False, 0.0)] * 2
