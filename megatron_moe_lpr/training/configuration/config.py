"""All flags of a training run, one dataclass per subject. Flags carry Megatron's names.

Imports neither torch nor Megatron, which take seconds: a mistake in a flag is reported at once.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_moe_lpr.checkpoint.format.retention import Retention
from megatron_moe_lpr.data.reading.config import DataConfig
from megatron_moe_lpr.engine.options import BatchOptions, OptimizerOptions
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Free, T
from megatron_moe_lpr.flag_ranges import INT_MAX, NonNegativeInt, PositiveInt, Range, check_ranges
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.parallel.layout import ParallelLayout, check_timeout
from megatron_moe_lpr.platform import PlatformName
from megatron_moe_lpr.training.configuration.stages import StageOptions

# Marks of flags that decide no number of a run, where several share the reason.
Storage = Annotated[T, Free("where, when and which checkpoints are read, written and kept, not what trains")]
Consent = Annotated[T, Free("says which changes are taken; these are recorded by themselves")]
Watching = Annotated[T, Free("logs and evaluations change no weight")]


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """Which checkpoints are loaded, saved, kept and resumed."""

    load: Storage[Path]
    """Checkpoint to take the weights from, at any layout. Once --save has a checkpoint of this run, that one counts."""
    save: Storage[Path]
    """Directory for this run's checkpoints and logs. A run resumes from its newest checkpoint there."""
    save_interval: Storage[NonNegativeInt | None] = None
    """Steps between checkpoints. Default, and 0: only at the end and on SIGTERM or SIGUSR1."""
    take_over: Storage[bool] = False
    """Take over the lock in --save from a run on another host. Only if you know that run has ended."""
    base_checkpoint: Storage[Path | None] = None
    """For a --load of --save-trainable-only: directory of the checkpoint that its run started from, if it has moved."""
    save_trainable_only: Storage[bool] = False
    """Save only what trains. Such a checkpoint is of use only together with --load: keep that."""
    save_retain_interval: Storage[PositiveInt | None] = None
    """Keep the checkpoint of every K-th step for good, and the newest --keep-last-checkpoints (then 2 by default)."""
    keep_last_checkpoints: Storage[PositiveInt | None] = None
    """Keep the newest N checkpoints; default: all. --load and a checkpoint that is being read are never removed."""
    async_save: Storage[bool] = True
    """Copy the checkpoint into host memory and write it from there while training goes on."""
    verify: Storage[bool] = True
    """Compare every file of a checkpoint with its checksum before use."""
    fall_back: Storage[bool] = True
    """If the latest checkpoint in --save is damaged, rename it and resume from the one before."""
    fall_back_to: Storage[NonNegativeInt | None] = None
    """Step of the checkpoint in --save to which the run may go back, though several newer ones are there or damaged."""
    accept_changes: Consent[tuple[str, ...]] = ()
    """Flags whose values may differ from the checkpoint's when resuming, e.g. lr data train-iters."""
    override_opt_param_scheduler: Consent[bool] = False
    """When resuming, use the given learning rate and weight decay settings."""
    use_checkpoint_opt_param_scheduler: Consent[bool] = False
    """When resuming, use the checkpoint's learning rate and weight decay settings."""

    def __post_init__(self) -> None:
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise UserError("--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler: give one of them")

    @property
    def retention(self) -> Retention:
        """Which checkpoints are kept."""
        return Retention(self.save_retain_interval, self.keep_last_checkpoints)


@dataclasses.dataclass(frozen=True)
class GuardOptions:
    """What to do in a step whose loss or gradient is not finite."""

    on_nonfinite: Annotated[
        Literal["stop", "skip"], Free("what happens in a step that is not finite, which the log tells")
    ] = "stop"
    """stop: end the run. skip: leave weights and optimizer as they were and take the next batch."""
    max_consecutive_skips: Annotated[PositiveInt, Free("how long a run goes on, not what it computes")] = 10
    """Steps in a row that may be skipped; one more ends the run."""


@dataclasses.dataclass(frozen=True)
class LoggingOptions:
    """Logs and evaluations."""

    log_interval: Watching[PositiveInt] = 10
    """Steps between log lines."""
    eval_interval: Watching[NonNegativeInt | None] = None
    """Steps between evaluations. Default, and 0: only at the end, if there is validation data."""
    eval_iters: Watching[Annotated[int, Range(-1, INT_MAX)]] = -1
    """Global batches (--global-batch-size) of each validation dataset to use; -1: all of it; 0: evaluate nothing."""
    tensorboard_dir: Watching[Path | None] = None
    """Write TensorBoard events there."""
    wandb_project: Watching[str | None] = None
    """Log to this Weights & Biases project too."""

    def valid_samples(self, global_batch_size: int) -> int | None:
        """Sequences of each validation dataset that an evaluation uses; None: all."""
        return None if self.eval_iters in (None, -1) else self.eval_iters * global_batch_size


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """A training run."""

    stage: tyro.conf.OmitArgPrefixes[StageOptions]
    checkpoint: tyro.conf.OmitArgPrefixes[CheckpointOptions]
    batch: tyro.conf.OmitArgPrefixes[BatchOptions]
    data: tyro.conf.OmitArgPrefixes[DataConfig]
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerOptions] = dataclasses.field(default_factory=OptimizerOptions)
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)
    layout: tyro.conf.OmitArgPrefixes[ParallelLayout] = dataclasses.field(default_factory=ParallelLayout)
    logging: tyro.conf.OmitArgPrefixes[LoggingOptions] = dataclasses.field(default_factory=LoggingOptions)
    guards: tyro.conf.OmitArgPrefixes[GuardOptions] = dataclasses.field(default_factory=GuardOptions)
    config: Annotated[Path | None, Free("its flags are recorded by themselves")] = None
    """YAML or JSON file with these flags, such as SAVE/config.json of another run. Flags beside it override it."""
    platform: Annotated[PlatformName, Free("rounding alone")] = "auto"
    """Where to run. auto: CUDA if there is a device."""
    distributed_timeout_minutes: Annotated[
        PositiveInt, tyro.conf.arg(name="distributed-timeout-minutes"), Free("when a run ends by force")
    ] = 10
    """A collective operation that takes longer ends the run; so does nine tenths of this time without progress."""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_timeout(self.distributed_timeout_minutes)
        self.batch.num_microbatches()
        self.optimizer.check_schedule(self.batch.train_iters)
