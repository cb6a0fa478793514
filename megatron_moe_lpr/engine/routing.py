"""Routing statistics of all MoE layers of a model, collected over ranks."""

import contextlib
import dataclasses
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
    """Set the statistics of this rank's routers to zero."""
    for _, router in routers(chunks):
        router.statistics.reset()


def count_routing(chunks: Sequence[torch.nn.Module], counts: bool) -> None:
    """Say whether the training steps that follow add to the statistics of this rank's routers, which costs launches."""
    for _, router in routers(chunks):
        router.counts_in_training = counts


def set_newest_weight(chunks: Sequence[torch.nn.Module], weight: float) -> None:
    """Set the weight of the latest expansion's experts, 0 to 1, in the softmax of every router with earlier ones."""
    for _, router in routers(chunks):
        if router.group_ends is not None:
            router.newest_weight = weight


def collect_routing(chunks: Sequence[torch.nn.Module], shape: ModelShape) -> RoutingReport:
    """Sum the statistics since the last reset over all ranks, then reset them. Every rank must call it."""
    counted = [(layer, router.statistics) for layer, router in routers(chunks)]
    report = gather_routing(counted, shape.architecture.num_layers, shape.max_experts)
    reset_routing(chunks)
    mixture = shape.architecture.mixture
    return dataclasses.replace(report, original_experts=mixture.num_experts) if mixture else report


@contextlib.contextmanager
def counted_apart(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Count routing inside the block from zero; after it the earlier counts are back and continue."""
    kept = [(router, router.statistics) for _, router in routers(chunks)]
    for router, _ in kept:
        router.statistics = RoutingStatistics(router.num_experts)
    try:
        yield
    finally:
        for router, statistics in kept:
            router.statistics = statistics
