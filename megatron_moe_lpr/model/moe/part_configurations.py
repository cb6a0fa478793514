"""Megatron's configuration for each part of the MoE layer: router, experts that EP ranks share, original expert."""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe_lpr.megatron.overriding import replace


@contextlib.contextmanager
def parameters_in_fp8(config: TransformerConfig) -> Iterator[None]:
    """Build Transformer Engine's linear layers with weights in FP8 while the block runs.

    Under `no_grad`, so that fp8_utils.py `get_fp8_context` keeps no second copy of the initial values: the optimizer
    would start from that copy, whereas here a checkpoint that is read later fills the weights.
    """
    config = copy.copy(config)
    replace(config, fp8_param=True)
    with torch.no_grad(), get_fp8_context(config, is_init=True):
        yield


def build_router(
    router: type,
    num_experts: int,
    base: int,
    *,
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection | None,
    **options: Any,
) -> torch.nn.Module:
    """Build the router for all experts: the layer's own configuration counts those that EP ranks share."""
    config = copy.copy(config)
    replace(config, num_moe_experts=num_experts, moe_expert_capacity_factor=None)
    return router(config=config, pg_collection=pg_collection, base=base, **options)


def dispatched_experts_config(config: TransformerConfig, num_experts: int) -> TransformerConfig:
    """The configuration of the `num_experts` experts that EP ranks share."""
    config = copy.copy(config)
    # A token has 0 to k new experts, where the flex dispatcher assumes k unless there is a capacity; an infinite one
    # drops nothing. The all-to-all dispatcher is given sorted rows, and need not count them.
    capacity = math.inf if config.moe_token_dispatcher_type == "flex" else None
    replace(config, num_moe_experts=num_experts, moe_expert_capacity_factor=capacity)
    return config


def original_expert_config(config: TransformerConfig) -> TransformerConfig:
    """The configuration of the original expert, a dense FFN."""
    config = copy.copy(config)
    replace(config, num_moe_experts=None)
    return config
