"""Optimizer steps only with gradients that are finite on every rank."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from megatron_moe_lpr.training.config import GuardOptions


class FiniteSteps:
    """Steps an optimizer, and counts the steps that were left out.

    In bf16 and fp32 Megatron-Core looks for overflow nowhere: a gradient that is not finite goes through the clipping
    into the weights (optimizer.py `ChainedOptimizer.step`). Here its norm decides before anything is changed, by the
    path that Megatron has for overflow in fp16: `prepare_grads` returns True, and `step` leaves everything as it is.

    The norm leaves out what another tensor-parallel rank has too; the buffers' sums are for a fault of one rank there.
    """

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer, options: GuardOptions
    ) -> None:
        self.buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        self.optimizer, self.options = optimizer, options
        self.grad_norm, self.in_a_row, self.skipped = 0.0, 0, 0
        # The norm that clipping needs is the one that is looked at: computed once.
        self._norm, self._prepare = optimizer.get_grad_norm, optimizer.prepare_grads
        optimizer.get_grad_norm = lambda: self.grad_norm
        optimizer.prepare_grads = self._found_non_finite

    def step(self) -> bool:
        """Whether the optimizer took the step. Every rank must call it; the answer is the same on all."""
        updated, _, _ = self.optimizer.step()
        if updated:
            self.in_a_row = 0
        return updated

    def may_skip(self) -> bool:
        """Count a step that is left out; False: this one ends the run."""
        self.in_a_row += 1
        self.skipped += 1
        return self.options.on_nonfinite == "skip" and self.in_a_row <= self.options.max_consecutive_skips

    def words(self) -> str:
        """What was left out so far."""
        most = self.options.max_consecutive_skips
        counts = f"{self.in_a_row} in a row of at most {most}, {self.skipped} in all"
        return f"skipped, weights and optimizer as before ({counts})"

    def _found_non_finite(self) -> bool:
        found = self._prepare()
        self.grad_norm = float(self._norm())
        found |= not math.isfinite(self.grad_norm)
        flag = torch.full((), int(found), device=torch.cuda.current_device())
        # Looked at on the device: the host waits once, for the answer of all ranks.
        for buffer in self.buffers:
            flag |= ~buffer.grad_data.sum().isfinite()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
