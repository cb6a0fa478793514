"""A training step on the CPU takes the CPU's own ways."""

import functools

import pytest
import torch
import torch.distributed as dist

from megatron_moe_lpr.model.moe import grouped_linear
from megatron_moe_lpr.platform.cpu import gradient_buffer
from megatron_moe_lpr.platform.cpu.expert_rows import bucket_size
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
    assert all(count == bucket_size(count) for count in counts)


def exchanged(ranks: int) -> tuple[list[float], list[float], int]:
    """This rank's sum, the gathered buffer, and how many calls went to gloo's own collectives."""
    group, rank = dist.group.WORLD, dist.get_rank()
    original = []

    def remember(output, source, **named):
        original.append(output)

    reduce_scatter = gradient_buffer._in_place(gradient_buffer._reduce_scatter, remember, False)
    all_gather = gradient_buffer._in_place(gradient_buffer._all_gather, remember, True)
    buffer = torch.arange(2.0 * ranks) * 10**rank
    piece = buffer.view(ranks, -1)[rank]
    reduce_scatter(piece, buffer, group=group, async_op=False, op=dist.ReduceOp.SUM)
    summed = piece.tolist()
    all_gather(buffer, piece, group=group, async_op=False)
    for elsewhere, asynchronous in ((torch.empty(2), False), (piece, True)):
        reduce_scatter(elsewhere, buffer, group=group, async_op=asynchronous, op=dist.ReduceOp.SUM)
        all_gather(buffer, elsewhere, group=group, async_op=asynchronous)
    reduce_scatter(piece, buffer, group=group, async_op=False, op=dist.ReduceOp.AVG)
    return summed, buffer.tolist(), len(original)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_buffers_are_exchanged_in_place_or_left_to_gloo(ranks):
    sums = [element * sum(10**rank for rank in range(ranks)) for element in range(2 * ranks)]
    for rank, (summed, gathered, to_gloo) in enumerate(rank_pool(ranks).run(functools.partial(exchanged, ranks))):
        assert summed == sums[2 * rank : 2 * rank + 2]
        assert gathered == sums
        assert to_gloo == 5
