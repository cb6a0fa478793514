"""A training step on the CPU takes the CPU's own ways."""

import functools

import pytest
import torch
from megatron.core import parallel_state

from megatron_moe_lpr.model import grouped_linear
from megatron_moe_lpr.platform.cpu.expert_rows import rounded
from megatron_moe_lpr.training import loop
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("step")
    return make_checkpoint(root), make_data(root)


def observed(*arguments, **changes) -> tuple[set[str], list[list[int]]]:
    """Classes of the optimizers that step, and the rows of each expert in each product."""
    optimizers, rows = set(), []
    original_step, original_forward = loop.Trainer.step, grouped_linear.GroupedLinear.forward

    def step(trainer, iterator):
        original_step(trainer, iterator)
        for part in getattr(trainer.state.optimizer, "chained_optimizers", [trainer.state.optimizer]):
            if part.optimizer is not None:
                optimizers.add(type(part.optimizer).__name__)

    def forward(self, tokens, tokens_per_expert):
        rows.append(tokens_per_expert)
        return original_forward(self, tokens, tokens_per_expert)

    loop.Trainer.step, grouped_linear.GroupedLinear.forward = step, forward
    try:
        train(*arguments, **changes)
    finally:
        loop.Trainer.step, grouped_linear.GroupedLinear.forward = original_step, original_forward
    return optimizers, rows


@pytest.mark.parametrize("distributed", [False, True])
def test_a_step_in_bf16(distributed, inputs, tmp_path):
    """The fused optimizer steps, and the experts' products have rounded numbers of rows."""
    options = {"fp32": False, "bf16": True, "use_distributed_optimizer": distributed, "train_iters": 2}
    task = functools.partial(observed, inputs[0], tmp_path / "run", inputs[1], **options)
    [(optimizers, rows)] = rank_pool(1).run(task)
    assert optimizers == {"FusedAdam"}
    counts = [count for product in rows for count in product]
    assert counts
    assert all(count == rounded(count) for count in counts)


def buffers_alone() -> tuple[bool, list[int]]:
    """Whether a collective is left out, and on how many elements the others ran."""
    from megatron_moe_lpr.platform.cpu.gradient_buffer import _unless_alone

    calls = []
    collective = _unless_alone(lambda output, source, **named: calls.append(output.numel()))
    buffer, group = torch.ones(4), parallel_state.get_data_parallel_group()
    collective(buffer.view(-1), buffer, group=group, async_op=False)
    left_out = not calls
    collective(torch.empty(3), torch.ones(3), group=group, async_op=False)
    collective(buffer, buffer, group=group, async_op=True)
    return left_out, calls


def test_a_buffer_on_one_rank_is_not_exchanged(cpu_platform):
    assert buffers_alone() == (True, [3, 4])
