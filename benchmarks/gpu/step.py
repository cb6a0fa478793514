"""A training step with random weights, of this project's model or with Megatron's own MoE layer in it."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

from benchmarks.gpu.task import EXPERTS, TOP_K, StepTask
from megatron_moe_lpr.engine import micro_batches
from megatron_moe_lpr.engine.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from megatron_moe_lpr.engine.options import BatchOptions, OptimizerOptions
from megatron_moe_lpr.engine.step import TrainingState, training_step
from megatron_moe_lpr.model import spec
from megatron_moe_lpr.model.build import build_model
from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import ModelShape, transformer_config
from megatron_moe_lpr.model.flops import training_flops_per_token
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import Platform, select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES, freeze

LANGUAGE_GROUP = (0, 1, -1)
"""Two languages, the first an original one; padding."""


@dataclasses.dataclass(frozen=True)
class BuiltStep:
    """A model with its optimizer."""

    run: Callable[[], float]
    """Takes one step; returns the loss."""
    tokens: int
    """Tokens of a step."""
    flops: float
    """Floating-point operations of a step (`model/flops.py`)."""


def build_step(task: StepTask) -> BuiltStep:
    """Build the model with random weights, made on the device; the process must have no other model.

    Raises:
        UserError: the platform cannot compute this.
        torch.OutOfMemoryError: the model does not fit.
    """
    platform = select_platform("cuda", 1, task.transformer_impl)
    initialize_parallel(platform, ParallelLayout())
    if task.stock and task.transformer_impl == "local":
        # RouterGatingLinearFunction of megatron-core asks for this name, which is undefined without Transformer Engine.
        vars(moe_utils)["te_general_gemm"] = None
    shape = ModelShape(read_architecture(task.config), (EXPERTS,) * task.layers, TOP_K)
    with _megatrons_moe_layer() if task.stock else contextlib.nullcontext():
        state = _build_state(task, shape, platform)
    batches = [_batch(task, shape, platform.device) for _ in range(task.micro_batches)]
    groups = torch.tensor(LANGUAGE_GROUP, device=platform.device)
    samples = task.micro_batch_size * task.micro_batches

    def run() -> float:
        with patch.object(micro_batches, "token_tags", _no_tags) if task.stock else contextlib.nullcontext():
            agreed = training_step(state, batches, groups, samples).agreed
        if agreed.not_finite is not None:
            raise ValueError(f"a step is not finite: {agreed.not_finite}")
        return agreed.sums.mean

    tokens = samples * task.seq_length
    return BuiltStep(run, tokens, tokens * training_flops_per_token(shape, STAGES[task.stage].trains, task.seq_length))


def _build_state(task: StepTask, shape: ModelShape, platform: Platform) -> TrainingState:
    stage = STAGES[task.stage]
    losses: dict[str, Any] = {**stage.coefficients, "calculate_per_token_loss": True}
    if task.stock:
        kind = "aux_loss" if task.stage == "1" else "none"
        losses |= {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.01 if task.stage == "1" else 0.0}
    options = ComputeOptions(bf16=not task.fp32, fp32=task.fp32)
    config = transformer_config(shape, ParallelLayout(), platform, options, **losses)
    chunks = build_model(shape, config, platform)
    with torch.no_grad():
        for weight in (weight for chunk in chunks for weight in chunk.parameters()):
            weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0.0, 1 / math.sqrt(weight.shape[-1]))
    freeze(chunks, stage)
    settings = OptimizerOptions(lr=1e-5).with_platform_defaults(platform)
    wrapped = wrap_data_parallel(chunks, config, settings)
    optimizer = build_optimizer(wrapped, config, settings, platform)
    batch = BatchOptions(1000, task.micro_batch_size, task.micro_batch_size * task.micro_batches, task.seq_length)
    return TrainingState(wrapped, optimizer, build_schedule(optimizer, settings, batch))


def _batch(task: StepTask, shape: ModelShape, device: torch.device) -> dict[str, torch.Tensor]:
    size = (task.micro_batch_size, task.seq_length)
    tokens = torch.randint(0, shape.architecture.vocab_size, size, device=device)
    positions = torch.arange(task.seq_length, device=device).expand(size)
    # Stage 2's data has both kinds of languages.
    language = torch.full(size, 1 if task.stage == "1" else 0, device=device)
    ones = torch.ones(size, device=device)
    return {"tokens": tokens, "labels": tokens, "loss_mask": ones, "position_ids": positions, "language": language}


@contextlib.contextmanager
def _megatrons_moe_layer() -> Iterator[None]:
    """Models built inside have Megatron's MoE layer: all experts, the original one's copy too, in one group."""

    def with_experts(layer: ModuleSpec, num_experts: int, dense: MLPSubmodules, grouped: MLPSubmodules) -> ModuleSpec:
        experts = ModuleSpec(module=TEGroupedMLP, submodules=grouped)
        moe = ModuleSpec(module=MoELayer, submodules=MoESubmodules(router=TopKRouter, experts=experts))
        return ModuleSpec(module=layer.module, submodules=dataclasses.replace(layer.submodules, mlp=moe))

    with patch.object(spec, "_with_experts", with_experts):
        yield


def _no_tags(*arguments: Any) -> None:
    """Megatron's router has no losses by language."""
