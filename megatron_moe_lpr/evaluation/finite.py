"""Stop an evaluation of weights or losses that are not finite."""

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
    """Check this rank's weights; every rank must call it.

    Raises:
        UserError: on all ranks, if a weight of the checkpoint on any of them is NaN or infinite.
    """
    not_finite = [
        name for chunk in chunks for name, weight in unwrap(chunk).named_parameters() if not is_finite(weight.detach())
    ]
    names_by_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names_by_rank, not_finite)
    for rank, names in enumerate(names_by_rank):
        if names:
            raise UserError(
                f"{directory}: {len(names)} weights on rank {rank} hold NaN or infinite values, for example "
                f"{names[0]}; use a checkpoint from before they appeared"
            )


def check_finite_losses(results: Sequence[DatasetLoss], directory: Path, dtype: torch.dtype) -> None:
    """Raise UserError if a loss is not finite although the weights are; losses are the same on all ranks."""
    for result in results:
        if not math.isfinite(result.loss):
            raise UserError(
                f"{directory}: the loss of {result.name} is not finite in {dtype}; evaluate with --fp32, or use "
                "another checkpoint"
            )
