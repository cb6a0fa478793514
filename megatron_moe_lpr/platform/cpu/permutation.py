"""Moving tokens to experts and back: moe/moe_utils.py with operations that are fast on a CPU."""

import functools
from typing import Any

import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
import torch

from megatron_moe_lpr.megatron.overriding import replace


def _unpermute_by_rows() -> None:
    """`unpermute` adds by scatter_add_, element by element. index_add_ adds whole rows, in the order of the rows."""
    original = token_dispatcher.unpermute

    @functools.wraps(original)
    def unpermute(
        tokens: torch.Tensor, indices: torch.Tensor, restore_shape: torch.Size, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if args or any(kwargs.get(name) is not None for name in ("probs", "pad_offsets")) or kwargs.get("fused"):
            return original(tokens, indices, restore_shape, *args, **kwargs)
        return tokens.new_zeros(restore_shape).index_add(0, indices, tokens)

    replace(token_dispatcher, unpermute=unpermute)


def _leave_sorted_chunks() -> None:
    """`sort_chunks_by_idxs` copies chunks that already lie in order, as they do on a single expert-parallel rank."""
    original = token_dispatcher.sort_chunks_by_idxs

    @functools.wraps(original)
    def sort_chunks(
        tokens: torch.Tensor,
        split_sizes: torch.Tensor,
        order: torch.Tensor,
        probs: torch.Tensor | None = None,
        fused: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if torch.equal(order, torch.arange(len(order))):
            return tokens, probs
        return original(tokens, split_sizes, order, probs, fused)

    replace(token_dispatcher, sort_chunks_by_idxs=sort_chunks)


def install() -> None:
    """token_dispatcher.py: after the experts, and around them."""
    _unpermute_by_rows()
    _leave_sorted_chunks()
