"""Five places of a run where code of others is called: its start, each step, each evaluation, each save and its end.

Every rank calls the callbacks of its own process, at the same places, in the order of the list, with the same values.
What writes a file or speaks to a service does so on one rank: `if torch.distributed.get_rank() == 0`. Callbacks may
differ from rank to rank, as long as none of them calls a collective.

All that a callback is given lies on the host already: no callback makes a step wait for the device. What the log says
(routing, tokens per second, memory) is known at log steps only, see `Step.metrics`.

A callback that raises ends the run on every rank: the rank where it did with that error, the others with an error that
contains its traceback (a `UserError` ends all as itself). From a step all ranks hear of it with what they agree on in
the next one, from elsewhere at once. Until then nothing is saved, and the callbacks of that rank are not called again.
As with any error, a save that is not complete yet is given up.
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

# A program names the base class before anything heavy is imported: torch comes with the first call.


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step, the same on every rank."""

    iteration: int
    """Counted from 1 over all starts of the run."""
    sums: "LossSums"
    """LM loss and tokens of the global batch, by language; not finite where the loss was not."""
    languages: tuple[str, ...]
    """Names, in the order of `sums`."""
    skipped: bool
    """Whether the weights stay as before: the loss or a gradient was not finite."""
    grad_norm: float
    """Norm of the gradients before clipping, of the last step that was not skipped."""
    lr: float
    """Learning rate of the next step."""
    consumed_samples: int
    consumed_tokens: int
    """Of the run so far, padding included."""
    metrics: "IntervalMetrics | None"
    """At each log step the means since the one before, routing, speed and memory (this rank's); else None."""

    @functools.cached_property
    def loss(self) -> float:
        """LM loss per token, in nats."""
        return self.sums.mean

    @functools.cached_property
    def language_losses(self) -> dict[str, float]:
        """LM loss per token, in nats, of each language that the step has tokens of."""
        return self.sums.by_language(self.languages)


class Callback:
    """Base class of what a run calls; each method does nothing until a subclass defines it."""

    def on_start(self, config: "TrainingConfig", iteration: int) -> None:
        """Called once when the run is ready for its first step.

        Args:
            config: every flag of the run.
            iteration: step that it goes on from; 0: it begins.
        """

    def on_step(self, step: Step) -> None:
        """Called after each optimizer step, before the save and the evaluation that are due with it."""

    def on_evaluation(self, iteration: int, result: "DatasetLoss") -> None:
        """Called after each validation dataset that was evaluated whole.

        Args:
            iteration: step whose weights were evaluated.
            result: loss, tokens, bits per byte and routing of one dataset.
        """

    def on_save(self, saved: "Saved") -> None:
        """Called when a checkpoint is complete on all ranks: `saved.path` is its directory, `saved.iteration` its step.

        An asynchronous save is complete some steps later than it began, or in the middle of an evaluation.
        """

    def on_end(self, iteration: int, finished: bool) -> None:
        """Called once after the last save, not where an error ends the run.

        Args:
            iteration: the last step.
            finished: False: a signal asked the run to stop; started again it goes on.
        """


class CallbackError(Exception):
    """A callback of another rank raised. The message contains its traceback."""


class Callbacks:
    """Calls a run's own callbacks, whose errors end this rank at once, and then those that the user gave."""

    def __init__(self, own: Sequence[Callback] = (), given: Sequence[Callback] = ()) -> None:
        """Take both. Every rank must make one, with whatever callbacks it has."""
        from megatron_moe_lpr.training.guards import gather_objects

        self.own, self.given = list(own), list(given)
        self._error: BaseException | None = None
        self._any_given = any(gather_objects(bool(given)))

    def start(self, config: "TrainingConfig", iteration: int) -> None:
        """Call on_start. Every rank must call this and each method below; they raise as `check` does."""
        self._call("on_start", config, iteration)
        self.check()

    def step(self, step: Step) -> None:
        """Call on_step. An error waits for the next `check`: a step exchanges nothing but what it must."""
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
        """Whether a callback of this rank raised, so that all ranks are to call `check`."""
        return self._error is not None

    def check(self) -> None:
        """Compare with all ranks. Every rank must call it.

        Raises:
            Exception: a callback raised: here its own error, on other ranks CallbackError, or UserError like here.
        """
        if not self._any_given:
            return
        from megatron_moe_lpr.training.guards import gather_objects

        failures = gather_objects(_failure(self._error))
        if self._error is not None:
            raise self._error
        for rank, failure in enumerate(failures):
            if failure is not None:
                is_users, text = failure
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
        UserError: something that is not an instance of a subclass of Callback.
    """
    for callback in callbacks:
        if not isinstance(callback, Callback):
            hint = "call it to make one" if isinstance(callback, type) else "derive its class from moe_lpr.Callback"
            raise UserError(f"callbacks: {callback!r}: an instance of a moe_lpr.Callback is expected; {hint}")


def _failure(error: BaseException | None) -> tuple[bool, str] | None:
    """What other ranks are sent: whether the text is a line for the user, and the text."""
    if error is None:
        return None
    if isinstance(error, UserError):
        return True, str(error)
    return False, "".join(traceback.format_exception(error))
