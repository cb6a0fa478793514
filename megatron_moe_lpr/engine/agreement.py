"""What all ranks agree on in a step: one tensor, summed over them once and read once.

A read makes the host wait until the device has caught up, and a device that has caught up has nothing to do until the
host has launched something new.
"""

import dataclasses

import torch
import torch.distributed as dist

from megatron_moe_lpr.engine.micro_batches import LossSums
from megatron_moe_lpr.liveness import waiting_for


@dataclasses.dataclass(frozen=True)
class Agreed:
    """The same on every rank, on the host."""

    sums: LossSums
    """Of all ranks."""
    gradients_finite: bool
    """On all ranks."""
    asked_to_stop: bool
    """Whether any rank received a signal."""

    @property
    def not_finite(self) -> str | None:
        """What stands in the way of the step."""
        if not torch.isfinite(self.sums.loss).all():
            return "loss"
        return None if self.gradients_finite else "gradient"


def agree(sums: LossSums, gradients_finite: torch.Tensor, asked_to_stop: bool) -> Agreed:
    """Reduce and read once. Every rank must call it.

    Args:
        sums: this rank's part, on the device.
        gradients_finite: bool, on the device, no dimensions: whether this rank's are.
        asked_to_stop: whether this rank received a signal.
    """
    flags = torch.full((2,), float(asked_to_stop), dtype=torch.float64, device=sums.loss.device)
    flags[0] = ~gradients_finite
    together = torch.cat((sums.loss, sums.tokens, flags))
    languages = len(sums.loss)
    with waiting_for("the losses of all ranks", on_peers=True):
        dist.all_reduce(together)
        loss, tokens, flags = together.cpu().split((languages, languages, 2))
    not_finite, asked = flags.tolist()
    return Agreed(LossSums(loss, tokens), not not_finite, bool(asked))
