"""Balanced routing in the place of a router's choices, which in a rehearsal mean nothing."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_moe_lpr.engine.routing import routers
from megatron_moe_lpr.rehearsal.sizes_only import SizesOnly

FAR = 1e4
"""By how much the logits of an expert that is not to be chosen are lowered."""


def balance(chunks: Iterable[torch.nn.Module], mode: SizesOnly) -> None:
    """Let every expert of each router get as many of a micro-batch's tokens as every other."""
    for _, router in routers(list(chunks)):
        router.routing = _balanced(router.routing, router.topk, mode)


def _balanced(route: Callable[..., Any], top_k: int, mode: SizesOnly) -> Callable[..., Any]:
    def routing(logits: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        with mode.computing():
            experts = logits.shape[-1]
            tokens = torch.arange(logits.numel() // experts, device=logits.device)
            chosen = (tokens[:, None] * top_k + torch.arange(top_k, device=logits.device)) % experts
            lowered = torch.full((len(tokens), experts), -FAR, device=logits.device).scatter(-1, chosen, 0.0)
            return route(logits * 0.0 + lowered.view(logits.shape), *arguments, **options)

    return routing
