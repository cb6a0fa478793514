"""Metrics of the steps between two lines of the log."""

import time

from megatron_moe_lpr.engine.micro_batches import LossSums
from megatron_moe_lpr.engine.routing import collect_routing
from megatron_moe_lpr.model.flops import training_flops_per_token
from megatron_moe_lpr.platform.devices import peak_memory_gigabytes
from megatron_moe_lpr.training.logs.metrics import IntervalMetrics
from megatron_moe_lpr.training.setup import Run


class Interval:
    """Adds up losses and time of the steps since the last log step; time of saves and evaluations is left out."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sums: LossSums | None = None
        """Losses of the steps that were not skipped; None: there was none."""
        self._begin()

    def _begin(self) -> None:
        self.sums, self.first, self.start = None, self.run.state.iteration, time.monotonic()

    @property
    def is_new(self) -> bool:
        """Whether the next step is the interval's first, and no step was skipped."""
        return self.sums is None and self.run.state.iteration == self.first

    def add(self, sums: LossSums) -> None:
        """Add a step that was not skipped."""
        self.sums = sums if self.sums is None else self.sums + sums

    def leave_out(self, since: float) -> None:
        """Leave out the time since `since` (time.monotonic()), in which nothing was trained."""
        self.start += time.monotonic() - since

    def ends_at(self, iteration: int) -> bool:
        """Whether this step is a log step."""
        config = self.run.config
        return iteration % config.logging.log_interval == 0 or iteration == config.batch.train_iters

    def end_if_due(self, grad_norm: float) -> IntervalMetrics | None:
        """At a log step, return the metrics of this interval and begin a new one. Every rank must call it each step.

        Returns:
            None: no log step, or all steps were skipped.
        """
        if not self.ends_at(self.run.state.iteration):
            return None
        metrics = self._metrics(self.sums, grad_norm) if self.sums is not None else None
        self._begin()
        return metrics

    def _metrics(self, sums: LossSums, grad_norm: float) -> IntervalMetrics:
        run, state = self.run, self.run.state
        seconds, steps = time.monotonic() - self.start, state.iteration - self.first
        shape, length = run.model.shape, run.config.batch.seq_length
        tokens = steps * run.config.batch.global_batch_size * length
        flops = training_flops_per_token(shape, run.stage.trains, length) * tokens
        return IntervalMetrics(
            iteration=state.iteration,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            loss=sums.mean,
            language_losses=sums.by_language(run.sources.languages.names),
            grad_norm=grad_norm,
            lr=current_lr(run),
            tokens_per_second=tokens / seconds,
            flops_per_second=flops / seconds,
            memory_gigabytes=peak_memory_gigabytes(run.platform),
            seconds_left=seconds / steps * (run.config.batch.train_iters - state.iteration),
            routing=collect_routing(state.chunks, shape) if run.model.config.num_moe_experts else None,
        )


def current_lr(run: Run) -> float:
    """Learning rate of the next step."""
    groups = run.state.optimizer.param_groups
    return float(groups[0]["lr"]) if groups else run.config.optimizer.lr
