"""A run's flags as they can be rehearsed on this machine, with a note for everything that is simulated otherwise."""

import dataclasses
from typing import get_args

from megatron_moe_lpr.engine.state_options import OptimizerStateOptions
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.planning.planned_run import PlannedRun, Recompute
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.rehearsal.rank import Rehearsed
from megatron_moe_lpr.training.configuration.config import TrainingConfig


@dataclasses.dataclass(frozen=True)
class SimulatedRun:
    """What is rehearsed of a run."""

    config: TrainingConfig
    notes: tuple[str, ...]
    """What differs from the run itself, a line each."""


def simulate(config: TrainingConfig, world_size: int) -> SimulatedRun:
    """Return a run of one step with as many micro-batches as fill the pipeline, on layers of PyTorch alone.

    Raises:
        UserError: the world or the global batch does not split into the layout.
    """
    layout, batch = config.layout, config.batch
    layout.check_world(world_size)
    data_parallel = layout.data_parallel_size(world_size)
    micro_batches = batch.num_microbatches(data_parallel)
    # The peak and the order of a schedule's calls show in its first passes; the others repeat them.
    shown = min(micro_batches, 2 * layout.pipeline_model_parallel_size)
    notes = ["layers of PyTorch alone (--transformer-impl local) on a GPU that is not there; nothing is sent"]
    if shown < micro_batches:
        notes.append(f"{shown} of the {micro_batches} micro-batches of a step; the others repeat them")
    compute = dataclasses.replace(config.compute, transformer_impl="local", deterministic_mode=False)
    if compute.fp8.enabled:
        notes.append("without FP8: products and what they keep are in bf16")
        compute = dataclasses.replace(compute, fp8=FP8Options())
    if compute.moe_token_dispatcher_type == "flex":
        notes.append("the all-to-all dispatcher in the place of DeepEP")
        compute = dataclasses.replace(
            compute, moe_token_dispatcher_type="alltoall", moe_flex_dispatcher_backend="deepep"
        )
    optimizer = dataclasses.replace(config.optimizer, lr_warmup_iters=0, lr_decay_iters=None, lr_wsd_decay_iters=None)
    if optimizer.states.use_precision_aware_optimizer:
        notes.append("without --use-precision-aware-optimizer: fp32 weights, moments and gradients")
        optimizer = dataclasses.replace(optimizer, states=OptimizerStateOptions())
    if config.checkpoint.save_trainable_only:
        notes.append("without --save-trainable-only: a save holds every weight")
    size = shown * batch.micro_batch_size * data_parallel
    opening = config.stage.open_experts_iters and 1
    changed = dataclasses.replace(
        config,
        stage=dataclasses.replace(config.stage, open_experts_iters=opening),
        checkpoint=dataclasses.replace(config.checkpoint, verify=False, save_trainable_only=False),
        batch=dataclasses.replace(batch, train_iters=1, global_batch_size=size),
        data=dataclasses.replace(config.data, num_workers=0),
        optimizer=optimizer,
        compute=compute,
        logging=dataclasses.replace(config.logging, eval_iters=1),
        platform="auto",
    )
    return SimulatedRun(changed, tuple(notes))


def planned_run(config: TrainingConfig, rehearsed: Rehearsed, world_size: int) -> PlannedRun:
    """Return what `plan` computes with: the rehearsed run's model, layout and sizes."""
    batch, bf16 = config.batch, rehearsed.bf16
    sizes = RunSizes(
        rehearsed.trains,
        world_size,
        batch.seq_length,
        batch.micro_batch_size,
        batch.global_batch_size,
        precision="bf16" if bf16 else "fp32",
        distributed_optimizer=rehearsed.distributed_optimizer,
        transformer_engine=False,
    )
    return PlannedRun(rehearsed.shape, config.layout, sizes, planned_recompute(config) or "none")


def planned_recompute(config: TrainingConfig) -> Recompute | None:
    """Return the planner's name of what the run recomputes; None: the planner has none for it."""
    compute = config.compute
    if compute.recompute_granularity is None:
        return "none"
    if compute.recompute_granularity == "full":
        plain = compute.recompute_method in (None, "uniform") and compute.recompute_num_layers in (None, 1)
        return "full" if plain else None
    modules = compute.recompute_modules or ("core_attn",)
    return next((name for name in get_args(Recompute) if modules == (name,)), None)
