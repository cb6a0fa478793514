"""Steps whose loss or gradient is not finite: skipped, or explained in the error that ends the run."""

from collections.abc import Sequence

import torch

from megatron_moe_lpr.data.reading.batches import Batch
from megatron_moe_lpr.engine.gradient_watch import NAMES_SHOWN
from megatron_moe_lpr.engine.micro_batches import run_schedule
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.model.configuration.config import MoELPRConfig
from megatron_moe_lpr.parallel.every_rank import decide_on_rank_0, first_on_any_rank
from megatron_moe_lpr.training.configuration.config import GuardOptions


class SkippedSteps:
    """Counts the steps that were skipped because a loss or gradient was not finite."""

    def __init__(self, options: GuardOptions) -> None:
        self.options, self.in_a_row, self.total = options, 0, 0

    def add(self) -> bool:
        """Count a skipped step; False: the run must end, since it may not skip this one."""
        self.in_a_row += 1
        self.total += 1
        return self.options.on_nonfinite == "skip" and self.in_a_row <= self.options.max_consecutive_skips

    def end(self) -> None:
        """Note that a step was not skipped."""
        self.in_a_row = 0

    def __str__(self) -> str:
        most = self.options.max_consecutive_skips
        counts = f"{self.in_a_row} in a row of at most {most}, {self.total} in all"
        return f"skipped, weights and optimizer as before ({counts})"


def explain_non_finite_loss(
    chunks: Sequence[torch.nn.Module],
    config: MoELPRConfig,
    batches: Sequence[Batch],
    language_group: torch.Tensor,
    iteration: int,
) -> UserError:
    """Run the step's batches forward again to find the first layer with an output that is not finite.

    Every rank must call it. Arguments: see `engine.micro_batches.run_micro_batches`.

    Returns:
        The error to raise, naming step, rank and layer.
    """
    found: list[int] = []
    hooks = [
        layer.register_forward_hook(_record_non_finite(layer.layer_number - 1, found))
        for chunk in chunks
        for layer in unwrap(chunk).decoder.layers
    ]
    try:
        with torch.no_grad():
            run_schedule(chunks, config, batches, language_group, forward_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    first = decide_on_rank_0(min(found, default=None), _first_layer)
    place = "after the last layer"
    if first is not None:
        layer, rank = first
        place = f"first in the output of layer {layer} (counted from 0) on rank {rank}"
    return UserError(f"step {iteration}: the loss is not finite, {place}; nothing was saved of this step")


def explain_non_finite_gradient(chunks: Sequence[torch.nn.Module], iteration: int) -> UserError:
    """Find parameters whose gradient is not finite, in a step whose loss is finite. Every rank must call it.

    Returns:
        The error to raise, naming step, rank and parameters.
    """
    names = [
        name
        for chunk in chunks
        for name, parameter in unwrap(chunk).named_parameters()
        if parameter.requires_grad and not torch.isfinite(parameter.main_grad).all()
    ]
    place = "the norm over all ranks"
    if first := first_on_any_rank(names[:NAMES_SHOWN] or None):
        rank, found = first
        place = f"on rank {rank} that of {', '.join(found)}"
    return UserError(f"step {iteration}: a gradient is not finite, {place}; nothing was saved of this step")


def _first_layer(layers: Sequence[int | None]) -> tuple[int, int] | None:
    """The lowest layer, and the lowest rank that found it, among what each rank found."""
    return min(((layer, rank) for rank, layer in enumerate(layers) if layer is not None), default=None)


def _record_non_finite(layer: int, found: list[int]):
    def hook(module: torch.nn.Module, inputs: tuple, output: tuple | torch.Tensor) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not torch.isfinite(hidden).all():
            found.append(layer)

    return hook
