"""Stop an evaluation of weights or losses that are not finite."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.losses import DatasetLoss
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.model.finite import is_finite
from megatron_moe_lpr.parallel.every_rank import first_on_any_rank


def check_finite_weights(chunks: Sequence[torch.nn.Module], directory: Path) -> None:
    """Check this rank's weights; every rank must call it.

    Raises:
        UserError: on all ranks, if a weight of the checkpoint on any of them is NaN or infinite.
    """
    not_finite = [
        name for chunk in chunks for name, weight in unwrap(chunk).named_parameters() if not is_finite(weight.detach())
    ]
    if first := first_on_any_rank((len(not_finite), not_finite[0]) if not_finite else None):
        rank, (count, name) = first
        raise UserError(
            f"{directory}: {count} weights on rank {rank} hold NaN or infinite values, for example "
            f"{name}; use a checkpoint from before they appeared"
        )


def check_finite_losses(results: Sequence[DatasetLoss], directory: Path, dtype: torch.dtype) -> None:
    """Raise UserError if a loss is not finite although the weights are; losses are the same on all ranks."""
    for result in results:
        if not math.isfinite(result.loss):
            raise UserError(
                f"{directory}: the loss of {result.name} is not finite in {dtype}; evaluate with --fp32, or use "
                "another checkpoint"
            )
