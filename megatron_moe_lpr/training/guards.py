"""Checks that stop a run before it does harm: parameters without a gradient, losses that are not finite."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_moe_lpr.data.reading.batches import Batch
from megatron_moe_lpr.engine.micro_batches import run_schedule
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.model.configuration.config import MoELPRConfig

NAMES_SHOWN = 5


class GradientWatch:
    """Sees which trainable parameters get a gradient during one backward pass.

    Full activation recompute without an input that requires a gradient, or a grouped layer whose first weight is
    frozen, leaves parameters without one and says nothing. An expert that no token chose still gets zeros.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self.waiting: dict[str, torch.nn.Parameter] = {}
        self.hooks = []
        for index, chunk in enumerate(chunks):
            for name, parameter in unwrap(chunk).named_parameters():
                if parameter.requires_grad:
                    full_name = f"chunk {index}: {name}" if len(chunks) > 1 else name
                    self.waiting[full_name] = parameter
                    self.hooks.append(parameter.register_hook(self._arrival(full_name)))

    def _arrival(self, name: str):
        def arrived(gradient: torch.Tensor | None) -> None:
            # torch calls hooks with None too, where an autograd function returned no gradient for this input.
            if gradient is not None:
                self.waiting.pop(name, None)

        return arrived

    def check(self) -> None:
        """End watching. Every rank must call it.

        Raises:
            UserError: on all ranks, with names of parameters that got no gradient on some rank.
        """
        for hook in self.hooks:
            hook.remove()
        missing = gather_objects(sorted(self.waiting))
        for rank, names in enumerate(missing):
            if names:
                shown = ", ".join(names[:NAMES_SHOWN])
                raise UserError(
                    f"rank {rank}: {len(names)} trainable parameters got no gradient in the first step, "
                    f"for example {shown}; nothing was saved"
                )


def gather_objects(value: object) -> list:
    """`value` of every rank, in rank order."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def explain_non_finite_loss(
    chunks: Sequence[torch.nn.Module],
    config: MoELPRConfig,
    batches: Sequence[Batch],
    original_table: torch.Tensor,
    iteration: int,
) -> UserError:
    """Run the step's batches forward again and find the first layer whose output is not finite. Every rank calls it.

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
            run_schedule(chunks, config, batches, original_table, forward_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    first = gather_objects(min(found, default=None))
    culprits = [(layer, rank) for rank, layer in enumerate(first) if layer is not None]
    place = "after the last layer"
    if culprits:
        layer, rank = min(culprits)
        place = f"first in the output of layer {layer} (counted from 0) on rank {rank}"
    return UserError(f"step {iteration}: the loss is not finite, {place}; nothing was saved of this step")


def explain_non_finite_gradient(chunks: Sequence[torch.nn.Module], iteration: int) -> UserError:
    """Name parameters whose gradient is not finite while the loss was. Every rank calls it.

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
    for rank, found in reversed(list(enumerate(gather_objects(names)))):
        if found:
            place = f"on rank {rank} that of {', '.join(found[:NAMES_SHOWN])}"
    return UserError(f"step {iteration}: a gradient is not finite, {place}; nothing was saved of this step")


def _record_non_finite(layer: int, found: list[int]):
    def hook(module: torch.nn.Module, inputs: tuple, output: tuple | torch.Tensor) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not torch.isfinite(hidden).all():
            found.append(layer)

    return hook
