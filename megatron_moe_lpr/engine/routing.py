"""The routing statistics of a whole model."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.moe.moe_layer import MoELPRLayer
from megatron_moe_lpr.model.moe.router import LPRRouter
from megatron_moe_lpr.model.moe.routing_statistics import RoutingReport, RoutingStatistics, gather_routing


def routers(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[int, LPRRouter]]:
    """Layer index from 0 and router of this rank's MoE layers."""
    for chunk in chunks:
        for layer in unwrap(chunk).decoder.layers:
            if isinstance(layer.mlp, MoELPRLayer):
                yield layer.layer_number - 1, layer.mlp.router


def reset_routing(chunks: Sequence[torch.nn.Module]) -> None:
    """Start counting anew."""
    for _, router in routers(chunks):
        router.statistics.reset()


def open_experts(chunks: Sequence[torch.nn.Module], openness: float) -> None:
    """Give the latest expansion's experts this weight in the softmax of every router that knows of earlier ones."""
    for _, router in routers(chunks):
        if router.group_ends is not None:
            router.openness = openness


def collect_routing(chunks: Sequence[torch.nn.Module], shape: ModelShape) -> RoutingReport:
    """Statistics since the last reset, added up over all ranks, and a new start. Every rank must call it."""
    counted = [(layer, router.statistics) for layer, router in routers(chunks)]
    report = gather_routing(counted, shape.architecture.num_layers, shape.max_experts)
    reset_routing(chunks)
    return report


@contextlib.contextmanager
def counted_apart(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Count what happens in this block by itself; what was counted before goes on after it."""
    kept = [(router, router.statistics) for _, router in routers(chunks)]
    for router, _ in kept:
        router.statistics = RoutingStatistics(router.num_experts)
    try:
        yield
    finally:
        for router, statistics in kept:
            router.statistics = statistics
