"""An evaluation stops where its numbers would mean nothing."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.losses import DatasetLoss
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.model.finite import is_finite


def check_finite_weights(chunks: Sequence[torch.nn.Module], directory: Path) -> None:
    """Every rank must call it.

    Raises:
        UserError: on all ranks: a weight of the checkpoint is NaN or infinite.
    """
    spoilt = [
        name for chunk in chunks for name, weight in unwrap(chunk).named_parameters() if not is_finite(weight.detach())
    ]
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, spoilt)
    for rank, names in enumerate(found):
        if names:
            raise UserError(
                f"{directory}: {len(names)} weights on rank {rank} hold NaN or infinite values, for example "
                f"{names[0]}; use a checkpoint from before they appeared"
            )


def check_finite_losses(results: Sequence[DatasetLoss], directory: Path, dtype: torch.dtype) -> None:
    """Raise UserError where a loss, the same on all ranks, is not finite although the weights are."""
    for result in results:
        if not math.isfinite(result.loss):
            raise UserError(
                f"{directory}: the loss of {result.name} is not finite in {dtype}; evaluate with --fp32, or use "
                "another checkpoint"
            )
