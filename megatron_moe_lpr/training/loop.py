"""The training loop: steps, evaluations and saves, until the last step or a request to stop."""

import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_moe_lpr.checkpoint.saving.saver import Saved
from megatron_moe_lpr.data.reading.batches import Batch
from megatron_moe_lpr.data.reading.validation_dataset import ValidationDataset
from megatron_moe_lpr.engine.routing import count_routing, reset_routing, set_newest_weight
from megatron_moe_lpr.engine.step import StepResult, training_step
from megatron_moe_lpr.training.batches import global_batches
from megatron_moe_lpr.training.callbacks import Callbacks, Step
from megatron_moe_lpr.training.guards import SkippedSteps, explain_non_finite_gradient, explain_non_finite_loss
from megatron_moe_lpr.training.interval import Interval, current_lr
from megatron_moe_lpr.training.logs.metrics import MetricsWriter
from megatron_moe_lpr.training.run_evaluations import RunEvaluations
from megatron_moe_lpr.training.run_saver import RunSaver
from megatron_moe_lpr.training.setup import Run
from megatron_moe_lpr.training.signals import stop_request
from megatron_moe_lpr.training.watchdog.heartbeat import Heartbeat


class Trainer:
    """Steps a prepared run until its end, or until a signal asks it to save and leave."""

    def __init__(
        self, run: Run, writer: MetricsWriter, saver: RunSaver, heartbeat: Heartbeat, callbacks: Callbacks | None = None
    ) -> None:
        self.callbacks = callbacks or Callbacks()
        self.run, self.state, self.writer = run, run.state, writer
        self.saver, self.heartbeat = saver, heartbeat
        self.language_group = run.language_group
        self.stop = stop_request()
        self.skips = SkippedSteps(run.config.guards)
        self.interval = Interval(run)
        self.grad_norm = 0.0
        self.asked_to_stop = False
        self.result: StepResult
        """Result of the latest step."""
        self.evaluations = RunEvaluations(run, writer.evaluated())

    def train(self) -> bool:
        """Run to the end.

        Returns:
            Whether the run is finished; False: it was asked to stop and has saved.
        """
        with self.saver.in_use():
            return self._train()

    def _train(self) -> bool:
        config, state = self.run.config, self.state
        batches = global_batches(self.run)
        reset_routing(state.chunks)
        set_newest_weight(state.chunks, self.run.newest_weight(state.iteration))
        self.callbacks.start(config, state.iteration)
        self._evaluate_if_due()
        while not self.asked_to_stop and state.iteration < config.batch.train_iters:
            self.heartbeat.step = state.iteration + 1
            # From the first step on there is something to save, so all ranks do it together.
            self.stop.nothing_to_save = False
            self.step(batches)
            if self.asked_to_stop:
                # Raises where a callback failed, not a signal, is the reason.
                self.callbacks.check()
            if not self.stop.has_stepped:
                self.saver.expect()
            self.stop.has_stepped = True
            self._report_saved(self.saver.poll())
            self._report()
            self._save_and_evaluate_if_due()
        self.save()
        self._report_saved(self.saver.wait())
        finished = self._is_last() and not self.evaluations.missing()
        self.callbacks.end(state.iteration, finished)
        return finished

    def _save_and_evaluate_if_due(self) -> None:
        """Save first: an evaluation may take longer than the time between a signal and the end."""
        saves = self._is_due(self.run.config.checkpoint.save_interval)
        if saves or self._is_last():
            self.save()
        if self._is_last():
            self._report_saved(self.saver.wait())
        evaluates = self._evaluate_if_due()
        if (saves or evaluates) and not self._is_last() and not self.asked_to_stop:
            # A save or evaluation takes long: a signal may have arrived meanwhile.
            self._agree_whether_to_stop()

    def _evaluate_if_due(self) -> bool:
        """Evaluate the datasets that are due and not evaluated, unless all ranks stop; return whether any was due."""
        missing = self.evaluations.missing()
        if missing and not self.asked_to_stop:
            self.evaluate(missing)
        return bool(missing)

    def _is_last(self) -> bool:
        return self.state.iteration >= self.run.config.batch.train_iters

    def _is_due(self, interval: int | None) -> bool:
        return bool(interval and self.state.iteration % interval == 0)

    def step(self, batches: Iterator[list[Batch]]) -> None:
        """Train on the next global batch. Raises UserError where a loss, a gradient or its absence is wrong."""
        run, state, batch = self.run, self.state, self.run.config.batch
        set_newest_weight(state.chunks, run.newest_weight(state.iteration + 1))
        count_routing(state.chunks, self.interval.ends_at(state.iteration + 1))
        micro_batches = next(batches)
        self.evaluations.begin_step()
        self.result = result = training_step(
            state,
            micro_batches,
            self.language_group,
            batch.global_batch_size,
            self._is_asked_to_stop,
            check_gradients=self.interval.is_new,
        )
        self.asked_to_stop = result.agreed.asked_to_stop
        if result.agreed.not_finite is None:
            self.grad_norm = result.grad_norm
            self.skips.end()
            self.interval.add(result.agreed.sums)
        else:
            self._skip(result.agreed.not_finite, micro_batches)
        state.iteration += 1
        state.consumed_samples += batch.global_batch_size
        state.consumed_tokens += batch.global_batch_size * batch.seq_length

    def _skip(self, what: str, batches: list[Batch]) -> None:
        """Report a step whose loss or gradient is not finite, or raise the error that ends the run."""
        chunks, step = self.state.chunks, self.state.iteration + 1
        if not self.skips.add():
            if what == "loss":
                raise explain_non_finite_loss(chunks, self.run.model.config, batches, self.language_group, step)
            raise explain_non_finite_gradient(chunks, step)
        self.writer.say(f"warning: step {step:,}: the {what} is not finite; {self.skips}")
        self.writer.write("skipped", step, {"reason": what, "in_a_row": self.skips.in_a_row})
        if what == "loss":
            reset_routing(chunks)

    def _report(self) -> None:
        """Call the callbacks of a step. Every rank must call it: at log steps routing is summed over the ranks."""
        state, agreed = self.state, self.result.agreed
        step = Step(
            iteration=state.iteration,
            sums=agreed.sums,
            languages=tuple(self.run.sources.languages.names),
            skipped=agreed.not_finite is not None,
            grad_norm=self.grad_norm,
            lr=current_lr(self.run),
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            metrics=self.interval.end_if_due(self.grad_norm),
        )
        began = time.monotonic()
        self.callbacks.step(step)
        if step.metrics:
            # The time to write the log belongs to no interval.
            self.interval.leave_out(began)

    def evaluate(self, datasets: Sequence[ValidationDataset]) -> None:
        """Evaluate validation datasets and report their losses. Every rank must call it.

        If any rank is asked to stop, all stop between two micro-batches; the dataset in progress has no result.
        """
        began = time.monotonic()
        self.callbacks.check()
        for dataset in datasets:
            result = self.evaluations.evaluate(dataset, self._after_pass)
            if result is None:
                self.asked_to_stop = True
                self.writer.say(f"step {self.state.iteration:,}: the evaluation on {dataset.name} was left unfinished")
                break
            self.callbacks.evaluation(self.state.iteration, result)
        self.interval.leave_out(began)

    def _after_pass(self) -> bool:
        """Complete a save between two passes of an evaluation; return whether this rank is asked to stop."""
        self._report_saved(self.saver.poll())
        return self._is_asked_to_stop()

    def save(self) -> None:
        """Start to write a checkpoint of this step, unless it has one; wait for the previous save first."""
        if self.saver.is_up_to_date:
            return
        began = time.monotonic()
        self.callbacks.check()
        # The log of steps that the checkpoint contains must not be lost with this process.
        self.writer.flush()
        self._report_saved(self.saver.finish_previous())
        saved = self.saver.start()
        self.interval.leave_out(began)
        self._report_saved(saved)

    def _report_saved(self, saved: Saved | None) -> None:
        if saved:
            self.callbacks.save(saved)

    def _is_asked_to_stop(self) -> bool:
        """Whether this rank received a signal, or a callback of it raised an error (`Callbacks.check` raises it)."""
        return self.stop.received is not None or self.callbacks.failed

    def _agree_whether_to_stop(self) -> None:
        """Set `asked_to_stop` on all ranks where any rank is asked to stop, so that all stop after the same step."""
        flag = torch.full((), int(self._is_asked_to_stop()), device=self.run.platform.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.asked_to_stop = bool(flag)
