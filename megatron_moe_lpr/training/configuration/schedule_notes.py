"""What a run says of its learning rate before its first step: where it would surprise."""

from collections.abc import Mapping
from typing import Any

from megatron_moe_lpr.training.configuration.config import TrainingConfig


def schedule_notes(config: TrainingConfig, begun: int = 0, recorded: Mapping[str, Any] | None = None) -> list[str]:
    """Lines for people; none where the schedule takes the whole run and is the one it began with.

    Args:
        begun: steps that the run has made so far.
        recorded: the run's description in the checkpoint that it goes on from; None: it has just begun.
    """
    options, train_iters = config.optimizer, config.batch.train_iters
    notes = []
    if recorded is not None and not config.checkpoint.use_checkpoint_opt_param_scheduler:
        notes += _stretched(config, recorded)
    first = max(train_iters - options.iters_after_decay(train_iters), begun) + 1
    count = train_iters - first + 1
    if options.lr == 0 and begun < train_iters:
        notes.append(f"warning: --lr 0: all {train_iters - begun:,} steps train with a rate of 0 and change no weight")
    elif count > 0 and options.min_lr == 0:
        notes.append(
            f"warning: steps {first:,} to {train_iters:,} ({count:,} steps) come after --lr-decay-iters "
            f"{options.lr_decay_iters:,} and train with --min-lr 0: they change no weight; raise one of the two, or "
            "lower --train-iters"
        )
    elif count > 0:
        notes.append(
            f"steps {first:,} to {train_iters:,} ({count:,} steps) come after --lr-decay-iters "
            f"{options.lr_decay_iters:,} and train with --min-lr {options.min_lr:g}"
        )
    return notes


def _stretched(config: TrainingConfig, recorded: Mapping[str, Any]) -> list[str]:
    """A schedule that ends with the run ends later where the run was lengthened."""
    options, before, now = config.optimizer, recorded.get("train_iters"), config.batch.train_iters
    if options.lr_decay_iters is not None or recorded.get("lr_decay_iters") is not None:
        return []
    if before in (None, now) or options.lr_decay_style == "constant":
        return []
    return [
        f"the learning rate now decays until step {now:,}, no longer until step {before:,}; "
        "--use-checkpoint-opt-param-scheduler keeps the schedule as it was"
    ]
