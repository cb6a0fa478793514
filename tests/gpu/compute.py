"""One step on either platform, in a rank of a pool: logits, loss and all gradients."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_moe_lpr.checkpoint.loading.model import LoadedModel, load_model
from megatron_moe_lpr.engine.gradient_watch import GradientWatch
from megatron_moe_lpr.engine.micro_batches import run_schedule, to_device
from megatron_moe_lpr.engine.optimizer import build_optimizer, wrap_data_parallel
from megatron_moe_lpr.engine.options import OptimizerOptions
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.model.forward import compute_logits
from megatron_moe_lpr.model.moe.moe_layer import MoELPRLayer
from megatron_moe_lpr.model.moe.router import LPRRouter
from megatron_moe_lpr.parallel.context import own_tokens
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import Platform, select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES, freeze
from tests.training.one_step import LANGUAGE_GROUP, VOCABULARY, gather_gradients, micro_batches, samples


@dataclasses.dataclass(frozen=True)
class Step:
    """How to compute it. The dictionaries are fields of the dataclasses that flags fill."""

    stage: str = "1"
    precision: dict[str, Any] = dataclasses.field(default_factory=dict)
    fp8: dict[str, Any] = dataclasses.field(default_factory=dict)
    layout: dict[str, int] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    micro_batch_size: int = 2
    frozen_by_mistake: str = ""
    """Parameters whose names end so are frozen too, whatever the stage."""
    load_balancing_coeff: float = 0.3
    lpr_loss_coeff: float = 0.5
    fixed_routing: bool = False
    """Experts by position instead of by the router: rounding cannot send a token elsewhere."""
    experts: tuple[int, ...] = ()
    """The experts of every token, as many as it takes; empty: the router's own choice."""


def compute(platform_name: str, checkpoint: Path, step: Step) -> dict[str, Any]:
    """On every rank: logits [batch, sequence, vocabulary], loss, whole gradients by checkpoint key, on the host, their
    norm as the optimizer computes it, and how many rows each layer's new experts of this rank got."""
    layout = ParallelLayout(**step.layout)
    platform = select_platform(platform_name, layout.tensor_model_parallel_size)
    initialize_parallel(platform, layout)
    model = load_model(
        checkpoint,
        layout,
        platform,
        ComputeOptions(**step.precision, fp8=FP8Options(**step.fp8)),
        load_balancing_coeff=step.load_balancing_coeff,
        lpr_loss_coeff=step.lpr_loss_coeff,
        calculate_per_token_loss=True,
    )
    if step.fixed_routing:
        route_by_position(model.chunks, samples()["tokens"].shape[1])
    if step.experts:
        route_to(model.chunks, step.experts)
    rows = count_rows(model.chunks)
    with torch.no_grad():
        logits = compute_logits(model.chunks, model.config, samples()["tokens"].to(platform.device), VOCABULARY)
    return {"logits": logits.float().cpu(), "rows": rows, **_step(model, step, platform)}


def _step(model: LoadedModel, step: Step, platform: Platform) -> dict[str, Any]:
    freeze(model.chunks, STAGES[step.stage])
    for chunk in model.chunks if step.frozen_by_mistake else []:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not name.endswith(step.frozen_by_mistake))
    options = OptimizerOptions(**step.optimizer)
    chunks = wrap_data_parallel(model.chunks, model.config, options)
    optimizer = build_optimizer(chunks, model.config, options, platform)
    watch = GradientWatch(chunks)
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    batches = [to_device(batch, platform.device) for batch in micro_batches(step.micro_batch_size)]
    sums = run_schedule(chunks, model.config, batches, LANGUAGE_GROUP.to(platform.device))
    watch.check()
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    gradients = {key: gradient.float().cpu() for key, gradient in gather_gradients(chunks).items()}
    return {"loss": sums.mean, "norm": norm, "gradients": gradients}


def route_by_position(chunks: list[torch.nn.Module], sequence: int) -> None:
    """Two experts for each position of `sequence`, the same whatever the weights are and as often as each other."""
    for chunk in chunks:
        for router in unwrap(chunk).modules():
            if isinstance(router, LPRRouter):
                router.routing = _Fixed(router, sequence)


def route_to(chunks: list[torch.nn.Module], experts: tuple[int, ...]) -> None:
    """Send every token to `experts`, whatever the weights are."""

    def always(route: Callable[..., Any], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lowered = torch.full_like(logits, -1e4)
        lowered[..., list(experts)] = 0.0
        return route(logits + lowered)

    for chunk in chunks:
        for router in unwrap(chunk).modules():
            if isinstance(router, LPRRouter):
                router.routing = partial(always, router.routing)


def count_rows(chunks: list[torch.nn.Module]) -> list[int]:
    """A list that gets an entry with each call of the new experts of this rank: the rows that they are given."""
    rows: list[int] = []
    for chunk in chunks:
        for module in unwrap(chunk).modules():
            if isinstance(module, MoELPRLayer):
                module.experts.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    return rows


class _Fixed:
    """`LPRRouter.routing` over logits in which two experts of each position stand far above the others."""

    def __init__(self, router: LPRRouter, sequence: int) -> None:
        self.router, self.route, self.sequence = router, router.routing, sequence

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts = logits.shape[-1]
        # Rows are [sequence / (CP TP), batch]; every sample of a micro-batch has the same experts at a position.
        positions = self._positions(logits.device)
        positions = positions.repeat_interleave(logits.shape[0] // len(positions))
        first = positions % experts
        second = (first + 1 + (positions // experts) % (experts - 1)) % experts
        chosen = torch.stack((first, second), 1).view(-1, 1, 2)
        lowered = torch.full_like(logits, -1e4).scatter(-1, chosen, 0.0)
        return self.route(logits + lowered)

    def _positions(self, device: torch.device) -> torch.Tensor:
        """Positions of this rank's rows in a sequence."""
        positions = torch.arange(self.sequence, device=device)
        positions = own_tokens(positions, 0, parallel_state.get_context_parallel_group())
        if self.router.config.sequence_parallel:
            ranks = parallel_state.get_tensor_model_parallel_world_size()
            positions = positions.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
        return positions
