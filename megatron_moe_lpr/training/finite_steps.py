"""Optimizer steps only with a loss and gradients that are finite on every rank."""

import math
from collections.abc import Callable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from megatron_moe_lpr.engine.agreement import Agreed, agree
from megatron_moe_lpr.engine.micro_batches import LossSums
from megatron_moe_lpr.megatron.overriding import replace
from megatron_moe_lpr.training.configuration.config import GuardOptions


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
        replace(optimizer, get_grad_norm=lambda: self.grad_norm, prepare_grads=self._found_non_finite)

    def step(self, sums: LossSums, asked_to_stop: Callable[[], bool]) -> Agreed:
        """Step the optimizer, unless something is not finite. Every rank must call it; all get the same answer.

        Args:
            sums: this rank's part of the step's losses, on the device.
            asked_to_stop: called as late as can be, when the device has caught up: whether this rank is to stop.
        """
        self._of_rank = sums, asked_to_stop
        self.optimizer.step()
        if self._agreed.not_finite is None:
            self.in_a_row = 0
        return self._agreed

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
        sums, asked_to_stop = self._of_rank
        finite = torch.full((), not found, device=sums.loss.device)
        # Looked at on the device: the host waits once, for the answer of all ranks.
        for buffer in self.buffers:
            finite &= buffer.grad_data.sum().isfinite()
        self._agreed = agree(sums, finite, asked_to_stop())
        return self._agreed.not_finite is not None
