"""One training step, from its micro-batches to the new weights and the next learning rate."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moe_lpr.data.reading.batches import Batch
from megatron_moe_lpr.engine.agreement import Agreed, agree
from megatron_moe_lpr.engine.gradient_watch import GradientWatch
from megatron_moe_lpr.engine.micro_batches import run_micro_batches
from megatron_moe_lpr.liveness import advance
from megatron_moe_lpr.model.build import unwrap


@dataclasses.dataclass
class TrainingState:
    """What a training step changes on a rank."""

    chunks: list[DistributedDataParallel]
    """This rank's part of the model."""
    optimizer: ChainedOptimizer
    schedule: OptimizerParamScheduler
    """Sets the learning rate by the number of samples so far."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The outcome of a training step, the same on every rank."""

    agreed: Agreed
    grad_norm: float
    """Norm of all gradients before clipping."""


def training_step(
    state: TrainingState,
    batches: Sequence[Batch],
    language_group: torch.Tensor,
    global_batch_size: int,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
    check_gradients: bool = False,
) -> StepResult:
    """Train on one global batch. Every rank must call it.

    Where the loss or a gradient is not finite on any rank, all ranks leave weights, optimizer and learning rate as they
    are (`Agreed.not_finite`). Megatron-Core checks this for float16 only: in bf16 and fp32 a gradient that is not
    finite would reach the weights through clipping (optimizer.py `ChainedOptimizer.step`, which is mirrored here).

    Args:
        batches: this rank's micro-batches on the model's device, [batch, sequence] each.
        language_group: see `micro_batches.step_weights`.
        global_batch_size: samples of the step over all ranks, by which the schedule advances.
        is_asked_to_stop: called after the backward pass: whether this rank wants all ranks to stop after this step.
        check_gradients: check that every trainable parameter gets a gradient.

    Raises:
        UserError: on every rank: with `check_gradients`, a parameter of some rank got no gradient.
    """
    chunks, optimizer = state.chunks, state.optimizer
    watch = GradientWatch(chunks) if check_gradients else None
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()

    # Forward and backward of all micro-batches. Megatron's schedule ends with `finalizing.finalize_gradients`: it sums
    # the gradients over the ranks and divides them by the number of tokens.
    rank_sums = run_micro_batches(chunks, unwrap(chunks[0]).config, batches, language_group)
    if watch:
        watch.check()

    overflow = optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    finite = torch.full((), not overflow and math.isfinite(grad_norm), device=rank_sums.loss.device)
    # The norm leaves out what another tensor-parallel rank holds too: a fault of this rank there shows in the sums of
    # its buffers. They are computed on the device, since the host waits once only, for what all ranks agree on.
    for buffer in (buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)):
        finite &= buffer.grad_data.sum().isfinite()
    agreed = agree(rank_sums, finite, is_asked_to_stop())

    if agreed.not_finite is None:
        _clip_gradients(optimizer, grad_norm)
        optimizer.step_with_ready_grads()
        state.schedule.step(increment=global_batch_size)
    advance()
    return StepResult(agreed, grad_norm)


def _clip_gradients(optimizer: ChainedOptimizer, grad_norm: float) -> None:
    """Scale the gradients to the norm --clip-grad where theirs is larger (`ChainedOptimizer.step`)."""
    for part in optimizer.chained_optimizers:
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
