"""All flags of a training run, one dataclass per subject. Flags carry Megatron's names.

Imports neither torch nor Megatron, which take seconds: a mistake in a flag is told at once.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from megatron_moe_lpr.checkpoint.retention import Retention
from megatron_moe_lpr.data.reading.config import DataConfig
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import Platform, PlatformName
from megatron_moe_lpr.training.stages import StageOptions

if TYPE_CHECKING:
    from megatron_moe_lpr.model.configuration.config import ComputeOptions


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """How much text a step takes, and how many steps there are."""

    train_iters: int
    """Optimizer steps of the whole run."""
    micro_batch_size: int = 1
    """Sequences a data-parallel rank computes at once."""
    global_batch_size: int = 512
    """Sequences of an optimizer step, over all ranks and accumulated micro-batches. Paper: 512."""
    seq_length: int = 1024
    """Tokens of a sequence. Paper: 1024 in stage 1, 512 in stage 2."""

    def num_microbatches(self, data_parallel_size: int) -> int:
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

    lr: float = 5e-5
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    lr_decay_style: Literal["cosine", "linear", "WSD", "constant"] = "cosine"
    """WSD: warm up, stay, decay in the last --lr-wsd-decay-iters steps."""
    lr_decay_iters: int | None = None
    """Steps until --min-lr. Default: --train-iters."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up from 0."""
    lr_wsd_decay_iters: int | None = None
    """Steps of WSD's decay. Default: a tenth of --lr-decay-iters."""
    lr_wsd_decay_style: Literal["cosine", "linear", "exponential", "minus_sqrt"] = "linear"
    """Shape of WSD's decay."""
    weight_decay: float = 0.0
    """Decoupled weight decay of trainable matrices."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest norm of all gradients together; 0: no clipping."""
    use_distributed_optimizer: bool = False
    """Split the optimizer's state over the data-parallel ranks. Always so in bf16."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated parameters during the next forward pass; needs the two above."""
    overlap_on_gpus: bool = True
    """On GPUs turn the three above on: a step then neither waits for gradients nor for parameters to travel, and a
    rank keeps its share of the optimizer's state only."""

    def __post_init__(self) -> None:
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise UserError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")

    def on(self, platform: Platform) -> "OptimizerOptions":
        """These options with the platform's launch defaults."""
        if not platform.on_gpus or not self.overlap_on_gpus:
            return self
        return dataclasses.replace(
            self, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        )


@dataclasses.dataclass(frozen=True)
class PrecisionOptions:
    """Number formats and what is recomputed instead of kept."""

    bf16: bool = False
    """Compute in bfloat16, with fp32 gradients, routers and optimizer. Default: the checkpoint's own dtype."""
    fp32: bool = False
    """Compute in fp32."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens travel to new experts on other ranks."""
    original_expert_overlap: bool = False
    """Compute the original expert on a stream of its own while tokens travel to new experts on other ranks. Without
    expert parallelism it has no effect, and on CPUs it changes the order of launches alone. Never timed on a GPU."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: whole layers, or --recompute-modules."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Full recompute: groups of --recompute-num-layers layers, or only the first so many of a stage."""
    recompute_num_layers: int | None = None
    """See --recompute-method."""
    recompute_modules: tuple[str, ...] | None = None
    """Selective recompute: core_attn, moe_act, layernorm, mlp, moe. Default: core_attn."""

    def compute_options(self, checkpoint_dtype: str, fp8: FP8Options | None = None) -> "ComputeOptions":
        """What the model room needs to know.

        Raises:
            UserError: both formats were asked for.
        """
        import torch

        from megatron_moe_lpr.model.configuration.config import ComputeOptions

        if self.bf16 and self.fp32:
            raise UserError("--bf16 and --fp32: give one of them")
        dtype = getattr(torch, checkpoint_dtype)
        if self.bf16 or self.fp32:
            dtype = torch.bfloat16 if self.bf16 else torch.float32
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
    """Where weights come from and where the run's state goes."""

    load: Path
    """Checkpoint to start from, at any layout: its weights, never its optimizer. A run that finds a checkpoint of its
    own in --save goes on from that one instead."""
    save: Path
    """Directory for this run's checkpoints, and its logs."""
    save_interval: int | None = None
    """Steps between checkpoints. One is always written at the end."""
    take_over: bool = False
    """Take the lock in --save from a run on another host, which this one cannot see: only where it has ended."""
    base_checkpoint: Path | None = None
    """For --load of a checkpoint with only trained weights: where the checkpoint is now that its run started from."""
    save_trainable_only: bool = False
    """Save only the weights that train, and their optimizer; --load keeps the others, and is needed with them."""
    save_retain_interval: int | None = None
    """Keep the checkpoints of every so many steps; of the others only --keep-last-checkpoints (default then: 2)."""
    keep_last_checkpoints: int | None = None
    """Keep this many of the newest checkpoints, and those of --save-retain-interval. Default: all are kept. The one the
    run started from and one that is being read are never removed."""
    async_save: bool = True
    """Train on while a checkpoint is written, by a process beside each rank from a copy of its share in host memory."""
    verify: bool = True
    """Compare every file of a checkpoint with its checksum before anything in it is used."""
    fall_back: bool = True
    """Where the latest checkpoint in --save is damaged, set it aside under another name and go on from
    the one before."""
    accept_changes: tuple[str, ...] = ()
    """Go on although these settings differ from those that the run's checkpoint records, by flag, e.g. lr data
    train-iters. They count from the checkpoint's step on."""
    override_opt_param_scheduler: bool = False
    """Accept changes of all learning rate and weight decay settings; the given ones count."""
    use_checkpoint_opt_param_scheduler: bool = False
    """Take learning rate and weight decay settings from the run's checkpoint, whatever is given."""

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

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """skip: leave the step out, weights and optimizer as they were, and go on with the next batch."""
    max_consecutive_skips: int = 10
    """Steps in a row that may be skipped; one more ends the run."""

    def __post_init__(self) -> None:
        if self.max_consecutive_skips < 1:
            raise UserError(f"--max-consecutive-skips {self.max_consecutive_skips}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class LoggingOptions:
    """What the run tells, and when."""

    log_interval: int = 10
    """Steps between log lines."""
    eval_interval: int | None = None
    """Steps between evaluations. Default: only at the end, where there is validation data."""
    eval_iters: int | None = None
    """Micro-batches of each validation dataset to use; default: all of it."""
    tensorboard_dir: Path | None = None
    """Write TensorBoard events there."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project too."""


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
    platform: PlatformName = "auto"
    """Where to run; auto: CUDA where there is a device."""
    distributed_timeout_minutes: Annotated[int, tyro.conf.arg(name="distributed-timeout-minutes")] = 10
    """A collective that takes longer ends the run."""
