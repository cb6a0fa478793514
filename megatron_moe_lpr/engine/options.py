"""Flags of a training step: batch size, optimizer, learning rate. Imports neither torch nor Megatron."""

import dataclasses
from typing import Annotated, Literal

from megatron_moe_lpr.engine.state_options import OptimizerStateOptions
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Acceptable, Decides, Free, Overlap, Scheduled
from megatron_moe_lpr.flag_ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Range
from megatron_moe_lpr.parallel.micro_batches import num_microbatches
from megatron_moe_lpr.platform import Platform

Decay = Annotated[float, Range(0, 1, below=True)]
"""Decay rate of a moment of Adam: below 1, since the moment is divided by 1 minus a power of it."""


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
        """Micro-batches of a step that each rank computes one after the other.

        Raises:
            UserError: the global batch does not divide.
        """
        return num_microbatches(self.global_batch_size, self.micro_batch_size, data_parallel_size)


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """AdamW, its learning rate over time, and gradient clipping. Defaults are the paper's."""

    lr: Scheduled[NonNegativeFloat] = 5e-5
    """Highest learning rate. In stage sft by default 2e-5."""
    min_lr: Scheduled[NonNegativeFloat] = 0.0
    """Learning rate at the end."""
    lr_decay_style: Scheduled[Literal["cosine", "linear", "WSD", "constant"]] = "cosine"
    """WSD: warm up, stay, decay in the last --lr-wsd-decay-iters steps. In stage sft by default linear."""
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
    states: OptimizerStateOptions = dataclasses.field(default_factory=OptimizerStateOptions)

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
        """Steps of WSD's decay; by default a tenth of all steps, at most those after the warm-up."""
        decay = self.decay_iters(train_iters)
        return self.lr_wsd_decay_iters or max(1, min(decay // 10, decay - self.lr_warmup_iters))

    def iters_after_decay(self, train_iters: int) -> int:
        """Steps of a run after --lr-decay-iters, which train with --min-lr."""
        return 0 if self.lr_decay_style == "constant" else max(0, train_iters - self.decay_iters(train_iters))

    def with_platform_defaults(self, platform: Platform) -> "OptimizerOptions":
        """Return these options with communication that overlaps and a split state, where the platform is GPUs."""
        if not platform.on_gpus or not self.overlap_on_gpus:
            return self
        return dataclasses.replace(
            self, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        )
