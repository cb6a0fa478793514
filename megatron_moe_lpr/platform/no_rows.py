"""Corrects Transformer Engine's permutation for a rank whose new experts get no row.

Of no rows its unpermute returns no rows instead of zeros for every token. Its permute to no rows returns gradients
without rows (transformer_engine/pytorch/permutation.py `_moe_unpermute_mask_map`, `_moe_permute_mask_map`) or, from
2.17 on, refuses it (`moe_permute_mask_map_forward`). In Megatron every rank's experts get rows; here all tokens may
choose the original expert, which takes no part in the permutation.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_moe_lpr.megatron.overriding import replace
from megatron_moe_lpr.megatron.versions import permutes_with_padding

_installed = False


def install() -> None:
    """Replace `permute` and `unpermute` of token_dispatcher.py, once per process."""
    global _installed
    if _installed:
        return
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    for name, guard in (("permute", _guarded_permute), ("unpermute", _guarded_unpermute)):
        replace(token_dispatcher, **{name: guard(getattr(token_dispatcher, name))})
    _installed = True


def _guarded_permute(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def permute(
        tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor | None, ...]:
        # Behind the rows and their weights: the indices and, from megatron-core 0.17 on, padding's offsets and counts.
        others: list[torch.Tensor | None] = [_nowhere(tokens)]
        if permutes_with_padding():
            others += [None, options.get("tokens_per_expert")]
        if not _expects_nothing(**options):
            rows, row_probs, *others = original(tokens, routing_map, probs=probs, **options)
            if len(rows) > 0:
                return rows, row_probs, *others
        # index_select of nothing has zeros of the whole shape as its gradient. A slice would do so too, but share
        # the memory of gathered tokens, which the next layer overwrites.
        rows = tokens.index_select(0, _nowhere(tokens))
        row_probs = None if probs is None else probs.reshape(-1).index_select(0, _nowhere(tokens))
        return rows, row_probs, *others

    return permute


def _guarded_unpermute(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def unpermute(
        tokens: torch.Tensor, indices: torch.Tensor, restore_shape: torch.Size, **options: Any
    ) -> torch.Tensor:
        if len(tokens) > 0:
            return original(tokens, indices, restore_shape, **options)
        # Zeros that depend on the rows, so that backward and its collectives still run through the experts.
        return tokens.new_zeros(restore_shape).index_add(0, _nowhere(tokens), tokens)

    return unpermute


def _expects_nothing(num_out_tokens: int | torch.Tensor | None = None, drop_and_pad: bool = False, **_: Any) -> bool:
    return num_out_tokens is not None and not drop_and_pad and int(num_out_tokens) == 0


def _nowhere(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.long, device=like.device)
