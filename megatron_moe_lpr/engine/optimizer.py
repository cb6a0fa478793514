"""Builds Megatron's data parallelism, optimizer and learning rate schedule for the chunks of a model."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megatron_moe_lpr.engine import host_optimizer
from megatron_moe_lpr.engine.finalizing import finalize_gradients
from megatron_moe_lpr.engine.options import BatchOptions, OptimizerOptions
from megatron_moe_lpr.engine.weight_gradients import fuse_weight_gradients, may_fuse
from megatron_moe_lpr.megatron.overriding import replace
from megatron_moe_lpr.model.configuration.config import MoELPRConfig
from megatron_moe_lpr.platform import Platform


def wrap_data_parallel(
    chunks: Sequence[torch.nn.Module], config: MoELPRConfig, options: OptimizerOptions
) -> list[DistributedDataParallel]:
    """Wrap each chunk in DistributedDataParallel: trainable parameters get gradient buffers, frozen ones none.

    The buffers are fp32; with --main-grads-dtype bf16 those of bf16 parameters are bf16.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=options.states.gradients_in_fp32,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        use_distributed_optimizer=options.use_distributed_optimizer,
        fp8_param_gather=config.fp8_new_expert_parameters,
    )
    wrapped = [
        # Only the first chunk's gradients are worth splitting into buckets: the others are reduced in its shadow.
        DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    fuse_weight_gradients(chunks, may_fuse(config))
    return wrapped


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], config: MoELPRConfig, options: OptimizerOptions, platform: Platform
) -> ChainedOptimizer:
    """Build AdamW over the trainable parameters, and set the hooks in `config` that Megatron's schedules call."""
    settings = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=options.use_distributed_optimizer,
        overlap_param_gather=options.overlap_param_gather,
        fp8_recipe=config.fp8_recipe if config.fp8 else None,
        **options.states.optimizer_fields(),
    )
    # Routers are float32 beside bfloat16 weights. In a parameter group of both, the distributed optimizer of
    # Megatron-Core puts all float32 parameters first and then saves each one's state under another's name.
    overrides = get_standard_config_overrides(settings) | {
        ParamKey(name=("*.router.weight", "*.router.base_rows")): ParamGroupOverride(wd_mult=1.0)
    }
    if options.states.optimizer_cpu_offload:
        host_optimizer.install()
    optimizer = get_megatron_optimizer(
        settings,
        list(chunks),
        config_overrides=overrides,
        use_gloo_process_groups=platform.on_gpus,
    )
    _connect(chunks, config, options, optimizer)
    return optimizer


def _connect(
    chunks: Sequence[DistributedDataParallel],
    config: MoELPRConfig,
    options: OptimizerOptions,
    optimizer: ChainedOptimizer,
) -> None:
    replace(config, finalize_model_grads_func=finalize_gradients, grad_scale_func=optimizer.scale_loss)
    if options.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        grad_sync = [chunk.start_grad_sync for chunk in chunks]
        replace(config, no_sync_func=no_sync if len(chunks) > 1 else no_sync[0])
        replace(config, grad_sync_func=grad_sync if len(chunks) > 1 else grad_sync[0])


def build_schedule(
    optimizer: ChainedOptimizer, options: OptimizerOptions, batch: BatchOptions
) -> OptimizerParamScheduler:
    """Build the schedule of learning rate and weight decay, which Megatron counts in samples instead of steps."""
    decay_iters = options.decay_iters(batch.train_iters)
    wsd_iters = options.wsd_decay_iters(batch.train_iters)
    samples = batch.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.lr_warmup_iters * samples,
        lr_decay_steps=decay_iters * samples,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=batch.train_iters * samples,
        wd_incr_style="constant",
        wsd_decay_steps=wsd_iters * samples if options.lr_decay_style == "WSD" else None,
        lr_wsd_decay_style=options.lr_wsd_decay_style if options.lr_decay_style == "WSD" else None,
        # These options win over a checkpoint's schedule: a difference was refused or accepted before.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
