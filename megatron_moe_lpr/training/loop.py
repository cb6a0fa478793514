"""The training loop."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_moe_lpr.checkpoint.saving.saver import Saved
from megatron_moe_lpr.data.reading.batches import Batch, build_data_iterator
from megatron_moe_lpr.data.reading.validation_dataset import ValidationDataset
from megatron_moe_lpr.engine.agreement import Agreed
from megatron_moe_lpr.engine.micro_batches import run_micro_batches, to_device
from megatron_moe_lpr.engine.routing import open_experts, reset_routing
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.losses import evaluate_dataset
from megatron_moe_lpr.liveness import advance
from megatron_moe_lpr.training.callbacks import Callbacks, Step
from megatron_moe_lpr.training.finite_steps import FiniteSteps
from megatron_moe_lpr.training.guards import (
    GradientWatch,
    explain_non_finite_gradient,
    explain_non_finite_loss,
    gather_objects,
)
from megatron_moe_lpr.training.interval import Interval, current_lr
from megatron_moe_lpr.training.logs.metrics import MetricsWriter
from megatron_moe_lpr.training.run_directory.run_lock import RunLock
from megatron_moe_lpr.training.run_saver import RunSaver
from megatron_moe_lpr.training.setup import Run
from megatron_moe_lpr.training.signals import stop_request
from megatron_moe_lpr.training.watchdog.heartbeat import Heartbeat


class Trainer:
    """Steps a prepared run until its end, or until a signal asks it to save and leave."""

    def __init__(
        self, run: Run, writer: MetricsWriter, lock: RunLock, heartbeat: Heartbeat, callbacks: Callbacks | None = None
    ) -> None:
        self.callbacks = callbacks or Callbacks()
        self.run, self.state, self.writer = run, run.state, writer
        self.heartbeat = heartbeat
        self.original_table = run.original_table
        self.stop = stop_request()
        self.steps = FiniteSteps(run.state.chunks, run.state.optimizer, run.config.guards)
        self.saver = RunSaver(run, lock, writer.say)
        self.interval = Interval(run)
        self.grad_norm = 0.0
        self.asked_to_stop = False
        self.agreed: Agreed
        """Of the latest step of this start."""
        self.evaluated: set[str] = set()
        """Names of the validation datasets that have a result of this step."""

    def train(self) -> bool:
        """Run to the end.

        Returns:
            Whether the run is finished; False: it was asked to stop, and has saved.
        """
        with self.saver.in_use():
            return self._train()

    def _train(self) -> bool:
        config, state = self.run.config, self.state
        batches = self._batches()
        reset_routing(state.chunks)
        open_experts(state.chunks, self.run.openness(state.iteration))
        # A signal or a kill may have cut off the evaluation of this step.
        self.evaluated = gather_objects(self.writer.evaluated())[0]
        self.callbacks.start(config, state.iteration)
        self._evaluate_if_due()
        while not self.asked_to_stop and state.iteration < config.batch.train_iters:
            self.heartbeat.step = state.iteration + 1
            # From the first step on there is something to save, so all ranks do it together.
            self.stop.nothing_to_save = False
            self.step(batches)
            if self.asked_to_stop:
                # By a signal, or for a callback that raised.
                self.callbacks.check()
            if not self.stop.has_stepped:
                self.saver.expect()
            self.stop.has_stepped = True
            self._tell_saved(self.saver.poll())
            self._report()
            self._save_and_evaluate_if_due()
        self.save()
        self._tell_saved(self.saver.wait())
        finished = self._is_last() and not self._missing_evaluations()
        self.callbacks.end(state.iteration, finished)
        return finished

    def _save_and_evaluate_if_due(self) -> None:
        """Save first: an evaluation may take longer than the time between a signal and the end."""
        saves = self._is_due(self.run.config.checkpoint.save_interval)
        if saves or self._is_last():
            self.save()
        if self._is_last():
            self._tell_saved(self.saver.wait())
        evaluates = self._evaluate_if_due()
        if (saves or evaluates) and not self._is_last() and not self.asked_to_stop:
            # That took time, in which a signal may have come.
            self._ask_whether_to_stop()

    def _evaluate_if_due(self) -> bool:
        """Evaluate what has no result of this step yet, unless all are asked to stop; whether there was something."""
        missing = self._missing_evaluations()
        if missing and not self.asked_to_stop:
            self.evaluate(missing)
        return bool(missing)

    def _missing_evaluations(self) -> list[ValidationDataset]:
        is_due = self._is_due(self.run.config.logging.eval_interval) or self._is_last()
        if not is_due or not self.state.iteration:
            return []
        return [dataset for dataset in self.run.datasets.valid if dataset.name not in self.evaluated]

    def _is_last(self) -> bool:
        return self.state.iteration >= self.run.config.batch.train_iters

    def _is_due(self, interval: int | None) -> bool:
        return bool(interval and self.state.iteration % interval == 0)

    def _batches(self) -> Iterator[Batch]:
        config = self.run.config
        if self.state.iteration >= config.batch.train_iters:
            return iter(())
        return build_data_iterator(
            self.run.datasets.train,
            self.state.consumed_samples,
            config.batch.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            config.data.num_workers,
            pin_memory=self.run.platform.on_gpus,
        )

    def step(self, iterator: Iterator[Batch]) -> None:
        """One optimizer step. Raises UserError where a loss, a gradient or its absence is wrong."""
        run, state, batch = self.run, self.state, self.run.config.batch
        watch = GradientWatch(state.chunks) if self.interval.is_new else None
        open_experts(state.chunks, run.openness(state.iteration + 1))
        device = run.platform.device
        batches = [to_device(part, device) for part in itertools.islice(iterator, run.num_microbatches)]
        self.evaluated = set()
        for chunk in state.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        of_rank = run_micro_batches(state.chunks, run.model.config, batches, self.original_table)
        if watch:
            watch.check()
        self.agreed = agreed = self.steps.step(of_rank, self._is_asked_to_stop)
        advance()
        self.asked_to_stop = agreed.asked_to_stop
        if agreed.not_finite is None:
            state.schedule.step(increment=batch.global_batch_size)
            self.grad_norm = self.steps.grad_norm
            self.interval.add(agreed.sums)
        elif agreed.not_finite == "loss":
            self._skip("loss", lambda step: self._explain_loss(batches, step))
            reset_routing(state.chunks)
        else:
            self._skip("gradient", lambda step: explain_non_finite_gradient(state.chunks, step))
        state.iteration += 1
        state.consumed_samples += batch.global_batch_size
        state.consumed_tokens += batch.global_batch_size * batch.seq_length

    def _skip(self, what: str, explain: Callable[[int], UserError]) -> None:
        """Leave a step out, or raise the error that ends the run."""
        step = self.state.iteration + 1
        if not self.steps.may_skip():
            raise explain(step)
        self.writer.say(f"warning: step {step:,}: the {what} is not finite; {self.steps.words()}")
        self.writer.write("skipped", step, {"reason": what, "in_a_row": self.steps.in_a_row})

    def _explain_loss(self, batches: list[Batch], step: int) -> UserError:
        return explain_non_finite_loss(self.state.chunks, self.run.model.config, batches, self.original_table, step)

    def _report(self) -> None:
        """Call the callbacks of a step. Every rank must call it: at log steps routing is summed over them."""
        state, agreed = self.state, self.agreed
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
            # What it takes to write them belongs to no interval.
            self.interval.leave_out(began)

    def evaluate(self, datasets: Sequence[ValidationDataset]) -> None:
        """Report the loss of validation datasets. Where any rank is asked to stop, all leave between two micro-batches;
        the dataset that they are in has no result then, since a mean over a part of it is another number."""
        run, began = self.run, time.monotonic()
        self.callbacks.check()
        for dataset in datasets:
            result = evaluate_dataset(
                self.state.chunks,
                run.model.config,
                run.model.shape,
                dataset,
                self.original_table,
                run.platform.device,
                run.config.batch.micro_batch_size,
                self._after_pass,
            )
            if result is None:
                self.asked_to_stop = True
                self.writer.say(f"step {self.state.iteration:,}: the evaluation on {dataset.name} was left unfinished")
                break
            self.callbacks.evaluation(self.state.iteration, result)
            self.evaluated.add(result.name)
        self.interval.leave_out(began)

    def _after_pass(self) -> bool:
        """In an evaluation, on every rank at the same place: complete a save, and whether this rank is to stop."""
        self._tell_saved(self.saver.poll())
        return self._is_asked_to_stop()

    def save(self) -> None:
        """Begin to write a checkpoint of this step, unless there is one; the one before is waited for."""
        if self.saver.is_up_to_date:
            return
        began = time.monotonic()
        self.callbacks.check()
        # What is logged of this step and those before must not be lost with this process.
        self.writer.flush()
        self._tell_saved(self.saver.make_way())
        saved = self.saver.start()
        self.interval.leave_out(began)
        self._tell_saved(saved)

    def _tell_saved(self, saved: Saved | None) -> None:
        if saved:
            self.callbacks.save(saved)

    def _is_asked_to_stop(self) -> bool:
        """Whether this rank received a signal, or a callback of it raised, which `Callbacks.check` then raises."""
        return self.stop.received is not None or self.callbacks.failed

    def _ask_whether_to_stop(self) -> None:
        """Whether any rank is asked to stop: all stop after the same step."""
        flag = torch.full((), int(self._is_asked_to_stop()), device=self.run.platform.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.asked_to_stop = bool(flag)
