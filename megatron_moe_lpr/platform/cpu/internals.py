"""Functions inside megatron-core that only work with a CUDA device or with Transformer Engine."""

import logging
from collections.abc import Callable
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_moe_lpr.megatron.overriding import replace
from megatron_moe_lpr.platform.torch_only import recompute


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


def _init_data(self: ShardedTensor, device: Any, init_fn: Callable[..., torch.Tensor] = torch.empty) -> None:
    if self.data is None:
        self.data = init_fn(self.local_shape, dtype=self.dtype, device="cpu")


def install() -> None:
    """Replace the functions in the modules that call them."""
    # tensor_parallel/random.py: the tracker's states are CUDA generator states
    replace(megatron_random, _get_cuda_rng_state=_get_rng_state, _set_cuda_rng_state=_set_rng_state)
    # The same file warns when CPU numbers are drawn inside the tracker, which here is the purpose.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    recompute.install()
    # dist_checkpointing/exchange_utils.py: memory for a tensor that another rank has read
    replace(ShardedTensor, init_data=_init_data)
