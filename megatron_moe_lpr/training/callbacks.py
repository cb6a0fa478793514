"""Callbacks of a run: at its start, after each step, each evaluation and each save, and at its end.

Every rank calls the callbacks of its own process, at the same moments, in the order of the list, with the same values.
A callback that writes a file or uses a service should do so on one rank: `if torch.distributed.get_rank() == 0`.
Callbacks may differ from rank to rank, as long as none of them calls a collective.

All values that a callback gets are on the host: no callback makes a step wait for the device. Routing, tokens per
second and memory are known at log steps only, see `Step.metrics`.

A callback that raises ends the run on every rank: its own rank with that error, the others with an error that contains
its traceback (a `UserError` ends all ranks as itself). After an error in `on_step` the other ranks learn of it in the
exchange of the next step, after other errors at once. Until then nothing is saved, and the callbacks of that rank are
not called again. As with any error, a save that is not complete is given up.
"""

import dataclasses
import functools
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.liveness import waiting_for

if TYPE_CHECKING:
    from megatron_moe_lpr.checkpoint.saving.saver import Saved
    from megatron_moe_lpr.engine.micro_batches import LossSums
    from megatron_moe_lpr.evaluation.losses import DatasetLoss
    from megatron_moe_lpr.training.configuration.config import TrainingConfig
    from megatron_moe_lpr.training.logs.metrics import IntervalMetrics

# Programs import the base class first: torch and others are imported with the first call.


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step, the same on every rank."""

    iteration: int
    """Number of the step, from 1, over all starts of the run."""
    sums: "LossSums"
    """LM loss and tokens of the global batch, by language; not finite where the loss was not."""
    languages: tuple[str, ...]
    """Names, in the order of `sums`."""
    skipped: bool
    """Whether the step changed no weight, since the loss or a gradient was not finite."""
    grad_norm: float
    """Norm of the gradients before clipping, in the last step that was not skipped."""
    lr: float
    """Learning rate of the next step."""
    consumed_samples: int
    consumed_tokens: int
    """Tokens of the run so far, padding included."""
    metrics: "IntervalMetrics | None"
    """At log steps: means since the previous log step, routing, speed and memory of this rank; else None."""

    @functools.cached_property
    def loss(self) -> float:
        """LM loss per token, in nats."""
        return self.sums.mean

    @functools.cached_property
    def language_losses(self) -> dict[str, float]:
        """LM loss per token, in nats, of each language that the step has tokens of."""
        return self.sums.by_language(self.languages)


class Callback:
    """Base class of callbacks; each method does nothing unless a subclass overrides it."""

    def on_start(self, config: "TrainingConfig", iteration: int) -> None:
        """Called once when the run is ready for its first step.

        Args:
            config: every flag of the run.
            iteration: step that the run resumes from; 0: it starts.
        """

    def on_step(self, step: Step) -> None:
        """Called after each optimizer step, before a save and an evaluation that are due at this step."""

    def on_evaluation(self, iteration: int, result: "DatasetLoss") -> None:
        """Called after the evaluation of each validation dataset, unless it was interrupted.

        Args:
            iteration: step whose weights were evaluated.
            result: loss, tokens, bits per byte and routing of one dataset.
        """

    def on_save(self, saved: "Saved") -> None:
        """Called when a checkpoint is complete on all ranks: `saved.path` is its directory, `saved.iteration` its step.

        An asynchronous save is complete some steps after it started, possibly during an evaluation.
        """

    def on_end(self, iteration: int, finished: bool) -> None:
        """Called once after the last save, unless an error ends the run.

        Args:
            iteration: the last step.
            finished: False: a signal asked the run to stop; started again, it resumes.
        """


class CallbackError(Exception):
    """A callback of another rank raised an error, whose traceback is in the message."""


class Callbacks:
    """Calls the callbacks of the package, whose errors end this rank at once, and then those of the user."""

    def __init__(self, own: Sequence[Callback] = (), given: Sequence[Callback] = ()) -> None:
        """Collect the callbacks of this rank. Every rank must make one.

        Args:
            own: callbacks of the package.
            given: callbacks of the user.
        """
        from megatron_moe_lpr.parallel.every_rank import first_on_any_rank

        self.own, self.given = list(own), list(given)
        self._error: BaseException | None = None
        self._any_given = first_on_any_rank(True if given else None) is not None

    def start(self, config: "TrainingConfig", iteration: int) -> None:
        """Call on_start. Every rank must call this method and those below, which raise errors as `check` does."""
        self._call("on_start", config, iteration)
        self.check()

    def step(self, step: Step) -> None:
        """Call on_step. An error is raised in the next `check`, so that a step needs no further exchange."""
        self._call("on_step", step)

    def evaluation(self, iteration: int, result: "DatasetLoss") -> None:
        """Call on_evaluation."""
        self._call("on_evaluation", iteration, result)
        self.check()

    def save(self, saved: "Saved") -> None:
        """Call on_save."""
        self._call("on_save", saved)
        self.check()

    def end(self, iteration: int, finished: bool) -> None:
        """Call on_end."""
        self.check()
        self._call("on_end", iteration, finished)
        self.check()

    @property
    def failed(self) -> bool:
        """Whether a callback of this rank raised an error: then all ranks must call `check`."""
        return self._error is not None

    def check(self) -> None:
        """Raise the error of a callback on all ranks. Every rank must call it.

        Raises:
            Exception: a callback of this rank raised it.
            CallbackError: a callback of another rank raised an error.
            UserError: a callback of any rank raised it.
        """
        if not self._any_given:
            return
        from megatron_moe_lpr.parallel.every_rank import first_on_any_rank

        first = first_on_any_rank(_failure(self._error))
        if self._error is not None:
            raise self._error
        if first is not None:
            rank, (is_users, text) = first
            raise UserError(text) if is_users else CallbackError(f"on rank {rank}:\n{text}")

    def _call(self, name: str, *values: Any) -> None:
        for callback in self.own:
            getattr(callback, name)(*values)
        for callback in self.given:
            if self._error is not None:
                return
            try:
                with waiting_for(f"{type(callback).__name__}.{name}"):
                    getattr(callback, name)(*values)
            except (Exception, SystemExit) as error:
                self._error = error


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Check what a program passes to `train`.

    Raises:
        UserError: one of them is not an instance of a subclass of Callback.
    """
    for callback in callbacks:
        if not isinstance(callback, Callback):
            hint = "call it to make one" if isinstance(callback, type) else "derive its class from moe_lpr.Callback"
            raise UserError(f"callbacks: {callback!r}: an instance of a moe_lpr.Callback is expected; {hint}")


def _failure(error: BaseException | None) -> tuple[bool, str] | None:
    """The error as other ranks get it: whether it is a UserError, and its message or traceback."""
    if error is None:
        return None
    if isinstance(error, UserError):
        return True, str(error)
    return False, "".join(traceback.format_exception(error))
