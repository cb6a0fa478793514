"""Functions inside megatron-core that only work with a CUDA device or with Transformer Engine."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_moe_lpr.megatron.overriding import replace, supply
from megatron_moe_lpr.megatron.versions import shares_recomputed_storage


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


def _split_sizes_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _init_data(self: ShardedTensor, device: Any, init_fn: Callable[..., torch.Tensor] = torch.empty) -> None:
    if self.data is None:
        self.data = init_fn(self.local_shape, dtype=self.dtype, device="cpu")


def _copy_storage(output: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Give a tensor whose memory was freed the recomputed values, as megatron-core 0.16 does.

    Later versions let both share their memory, by C++ that needs a compiler at run time.
    """
    with torch.no_grad():
        output.untyped_storage().resize_(recomputed.untyped_storage().size())
        output.untyped_storage().copy_(recomputed.untyped_storage())


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


def install() -> None:
    """Replace the functions in the modules that call them."""
    # tensor_parallel/random.py: the tracker's states are CUDA generator states
    replace(megatron_random, _get_cuda_rng_state=_get_rng_state, _set_cuda_rng_state=_set_rng_state)
    # The same file warns when CPU numbers are drawn inside the tracker, which here is the purpose.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    # tensor_parallel/random.py CheckpointWithoutOutput (recompute of norms and expert activations), likewise
    if not hasattr(megatron_random, "FP8GlobalStateManager"):
        supply(megatron_random, FP8GlobalStateManager=NoFP8)
        supply(megatron_random, activation_recompute_forward=_no_context, fp8_autocast=_no_context)
    # dist_checkpointing/exchange_utils.py: memory for a tensor that another rank has read
    replace(ShardedTensor, init_data=_init_data)
    # moe/token_dispatcher.py `_maybe_dtoh_and_synchronize`: a device-to-host copy of a tensor already on the host
    replace(token_dispatcher, maybe_move_tensor_to_cpu=_split_sizes_on_host)
    if shares_recomputed_storage():
        replace(megatron_random, _get_share_storage=lambda: _copy_storage)
