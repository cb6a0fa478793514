"""Recompute of norms and expert activations where Transformer Engine is not installed, or no compiler."""

import contextlib
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import torch

from megatron_moe_lpr.megatron.overriding import replace, supply
from megatron_moe_lpr.megatron.versions import shares_recomputed_storage


class NoFP8:
    """Stand-in for Transformer Engine's `FP8GlobalStateManager`: FP8 is never enabled."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Return False."""
        return False

    @staticmethod
    def get_fp8_recipe() -> None:
        """Return None."""


def _no_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def _copy_storage(output: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Give a tensor whose memory was freed the recomputed values, as megatron-core 0.16 does.

    Later versions let both share their memory, by C++ that needs a compiler at run time.
    """
    with torch.no_grad():
        output.untyped_storage().resize_(recomputed.untyped_storage().size())
        output.untyped_storage().copy_(recomputed.untyped_storage())


def install() -> None:
    """Give tensor_parallel/random.py `CheckpointWithoutOutput` what it uses of Transformer Engine and of a compiler."""
    if not hasattr(megatron_random, "FP8GlobalStateManager"):
        supply(megatron_random, FP8GlobalStateManager=NoFP8)
        supply(megatron_random, activation_recompute_forward=_no_context, fp8_autocast=_no_context)
    if shares_recomputed_storage():
        replace(megatron_random, _get_share_storage=lambda: _copy_storage)
