"""All flags of a training run, one dataclass per subject. Flags carry Megatron's names.

Imports neither torch nor Megatron, which take seconds: a mistake in a flag is told at once.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from megatron_moe_lpr.checkpoint.format.retention import Retention
from megatron_moe_lpr.data.reading.config import DataConfig
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Acceptable, Decides, Free, RecordedAs, Scheduled, T
from megatron_moe_lpr.flag_ranges import INT_MAX, NonNegativeFloat, NonNegativeInt, PositiveInt, Range, check_ranges
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.parallel.layout import ParallelLayout, check_timeout
from megatron_moe_lpr.platform import Platform, PlatformName
from megatron_moe_lpr.training.configuration.stages import StageOptions

if TYPE_CHECKING:
    import torch

    from megatron_moe_lpr.model.configuration.config import ComputeOptions

Decay = Annotated[float, Range(0, 1, below=True)]
"""Of a moment of Adam, which divides by what is left of 1."""

# What flags that decide no number of a run are for, where several share the reason.
Overlap = Annotated[T, Free("when something is computed or sent, not what")]
Recomputation = Annotated[T, Free("computes the same twice")]
Storage = Annotated[T, Free("where, when and which checkpoints are read, written and kept, not what trains")]
Consent = Annotated[T, Free("says which changes are taken; these are recorded by themselves")]
Watching = Annotated[T, Free("logs and evaluations change no weight")]


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """Batch size and number of steps."""

    train_iters: Acceptable[PositiveInt]
    """Optimizer steps of the whole run."""
    micro_batch_size: Annotated[PositiveInt, Free("cuts the same global batch otherwise: rounding alone")] = 1
    """Sequences a data-parallel rank computes at once."""
    global_batch_size: Decides[PositiveInt] = 512
    """Sequences of an optimizer step, over all ranks and accumulated micro-batches. Paper: 512."""
    seq_length: Decides[PositiveInt] = 1024
    """Tokens of a sequence. Paper: 1024 in stage 1, 512 in stage 2."""

    def num_microbatches(self, data_parallel_size: int = 1) -> int:
        """Micro-batches a rank accumulates in one step.

        Raises:
            UserError: the global batch does not divide.
        """
        together = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % together:
            raise UserError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of --micro-batch-size "
                f"{self.micro_batch_size} x {data_parallel_size} data-parallel ranks = {together}"
            )
        return self.global_batch_size // together


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """AdamW, its learning rate over time, and gradient clipping. Defaults are the paper's."""

    lr: Scheduled[NonNegativeFloat] = 5e-5
    """Highest learning rate."""
    min_lr: Scheduled[NonNegativeFloat] = 0.0
    """Learning rate at the end."""
    lr_decay_style: Scheduled[Literal["cosine", "linear", "WSD", "constant"]] = "cosine"
    """WSD: warm up, stay, decay in the last --lr-wsd-decay-iters steps."""
    lr_decay_iters: Scheduled[PositiveInt | None] = None
    """Steps until --min-lr, at which later ones stay. Default: --train-iters."""
    lr_warmup_iters: Scheduled[NonNegativeInt] = 0
    """Steps of linear warm-up from 0."""
    lr_wsd_decay_iters: Scheduled[PositiveInt | None] = None
    """Steps of WSD's decay. Default: a tenth of --lr-decay-iters."""
    lr_wsd_decay_style: Scheduled[Literal["cosine", "linear", "exponential", "minus_sqrt"]] = "linear"
    """Shape of WSD's decay."""
    weight_decay: Scheduled[NonNegativeFloat] = 0.0
    """Decoupled weight decay of trainable matrices."""
    adam_beta1: Acceptable[Decay] = 0.9
    """Decay of the first moment."""
    adam_beta2: Acceptable[Decay] = 0.999
    """Decay of the second moment."""
    adam_eps: Acceptable[Annotated[float, Range(1e-37, 1)]] = 1e-8
    """Added to the root of the second moment. Above 0 in float32, or what has no gradient would become NaN."""
    clip_grad: Acceptable[NonNegativeFloat] = 1.0
    """Largest norm of all gradients together; 0: no clipping."""
    use_distributed_optimizer: Annotated[bool, Free("where states lie: rounding alone")] = False
    """Split the optimizer's state over the data-parallel ranks. Always so in bf16."""
    overlap_grad_reduce: Overlap[bool] = False
    """Reduce gradients during the backward pass."""
    overlap_param_gather: Overlap[bool] = False
    """Gather updated parameters during the next forward pass; needs the two above."""
    overlap_on_gpus: Overlap[bool] = True
    """On GPUs, turn the three flags above on: communication overlaps, and the optimizer's state is split."""

    def __post_init__(self) -> None:
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise UserError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")

    def check_schedule(self, train_iters: int) -> None:
        """Check the settings of the schedule against each other, as Megatron's OptimizerParamScheduler asserts them.

        Raises:
            UserError: naming the flags.
        """
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr}: must be at most --lr {self.lr}, the highest learning rate")
        decay = self.decay_iters(train_iters)
        name = "--train-iters" if self.lr_decay_iters is None else "--lr-decay-iters"
        if self.lr_warmup_iters >= decay:
            raise UserError(f"--lr-warmup-iters {self.lr_warmup_iters}: must be below {name} {decay}")
        if self.lr_decay_style == "WSD" and self.wsd_decay_iters(train_iters) > decay - self.lr_warmup_iters:
            raise UserError(
                f"--lr-wsd-decay-iters {self.lr_wsd_decay_iters}: must be at most {decay - self.lr_warmup_iters}, what "
                f"--lr-warmup-iters {self.lr_warmup_iters} leaves of {name} {decay}"
            )

    def decay_iters(self, train_iters: int) -> int:
        """Steps until --min-lr."""
        return self.lr_decay_iters or train_iters

    def wsd_decay_iters(self, train_iters: int) -> int:
        """Steps of WSD's decay, by default a tenth of all, or what the warm-up leaves."""
        decay = self.decay_iters(train_iters)
        return self.lr_wsd_decay_iters or max(1, min(decay // 10, decay - self.lr_warmup_iters))

    def iters_after_decay(self, train_iters: int) -> int:
        """Steps of a run that come after --lr-decay-iters and train with --min-lr."""
        return 0 if self.lr_decay_style == "constant" else max(0, train_iters - self.decay_iters(train_iters))

    def on(self, platform: Platform) -> "OptimizerOptions":
        """These options with the platform's launch defaults."""
        if not platform.on_gpus or not self.overlap_on_gpus:
            return self
        return dataclasses.replace(
            self, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        )


@dataclasses.dataclass(frozen=True)
class PrecisionOptions:
    """Number formats, dispatch of tokens to experts, and activation recomputation."""

    bf16: Annotated[bool, RecordedAs("dtype")] = False
    """Compute in bfloat16, with fp32 gradients, routers and optimizer. Default: what the run before computed in, or the
    checkpoint's own dtype; for a float16 one bfloat16. CPUs without bf16 instructions compute in fp32 by default."""
    fp32: Annotated[bool, RecordedAs("dtype")] = False
    """Compute in fp32."""
    fp16: Annotated[bool, Free("refused")] = False
    """Not offered: float16 models train in bf16 or fp32, and frozen weights keep their float16 bits."""
    moe_token_dispatcher_type: Annotated[
        Literal["alltoall", "allgather", "flex"], Free("how tokens travel: rounding alone")
    ] = "alltoall"
    """Communication of tokens to new experts on other ranks. flex needs DeepEP."""
    original_expert_overlap: Overlap[bool] = False
    """With EP on GPUs, compute the original expert on its own stream during the all-to-all. Never timed on a GPU."""
    recompute_granularity: Recomputation[Literal["full", "selective"] | None] = None
    """Recompute activations in the backward pass: whole layers, or --recompute-modules."""
    recompute_method: Recomputation[Literal["uniform", "block"] | None] = None
    """Full recompute. uniform: groups of --recompute-num-layers layers; block: only the first so many of a PP stage."""
    recompute_num_layers: Recomputation[PositiveInt | None] = None
    """Layers for --recompute-method. Default: 1."""
    recompute_modules: Recomputation[tuple[str, ...] | None] = None
    """Selective recompute: core_attn, moe_act, layernorm, mlp, moe. Default: core_attn."""

    def asked_dtype(self) -> "torch.dtype | None":
        """What a flag asks to compute in; None: no flag does. Raises UserError, see `dtype.asked_dtype`."""
        from megatron_moe_lpr.model.configuration.dtype import asked_dtype

        return asked_dtype(self.bf16, self.fp32, self.fp16)

    def compute_options(self, dtype: "torch.dtype", fp8: FP8Options | None = None) -> "ComputeOptions":
        """What the model needs to know, to compute in `dtype`."""
        from megatron_moe_lpr.model.configuration.config import ComputeOptions

        full = self.recompute_granularity == "full"
        return ComputeOptions(
            dtype=dtype,
            moe_token_dispatcher_type=self.moe_token_dispatcher_type,
            original_expert_overlap=self.original_expert_overlap,
            recompute_granularity=self.recompute_granularity,
            recompute_method=self.recompute_method or ("uniform" if full else None),
            recompute_num_layers=self.recompute_num_layers or (1 if full else None),
            recompute_modules=self.recompute_modules,
            fp8=fp8 or FP8Options(),
        )


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
    """What to do about a loss or a gradient that is not finite."""

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
    precision: tyro.conf.OmitArgPrefixes[PrecisionOptions] = dataclasses.field(default_factory=PrecisionOptions)
    fp8: tyro.conf.OmitArgPrefixes[FP8Options] = dataclasses.field(default_factory=FP8Options)
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
