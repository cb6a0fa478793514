"""The one exchange of a training step in which all ranks agree on losses, finiteness and a request to stop.

Everything is summed over the ranks as one tensor, which the host reads once: a read makes the host wait until the
device has caught up, and the device is then idle until the host has launched something new.
"""

import dataclasses

import torch
import torch.distributed as dist

from megatron_moe_lpr.engine.micro_batches import LossSums
from megatron_moe_lpr.liveness import waiting_for


@dataclasses.dataclass(frozen=True)
class Agreed:
    """What all ranks agree on in a training step: the same on every rank, on the host."""

    sums: LossSums
    """Losses and tokens of the global batch."""
    gradients_finite: bool
    """Whether the gradients are finite on every rank."""
    asked_to_stop: bool
    """Whether any rank is asked to stop after this step."""

    @property
    def not_finite(self) -> str | None:
        """`loss` or `gradient`, whichever is not finite; None: both are, and the optimizer steps."""
        if not torch.isfinite(self.sums.loss).all():
            return "loss"
        return None if self.gradients_finite else "gradient"


def agree(sums: LossSums, gradients_finite: torch.Tensor, asked_to_stop: bool) -> Agreed:
    """Sum losses and flags over all ranks, and read them once. Every rank must call it.

    Args:
        sums: this rank's part of the losses, on the device.
        gradients_finite: bool, no dimensions, on the device: whether this rank's gradients are finite.
        asked_to_stop: whether this rank received a signal, or a callback of it raised.
    """
    flags = torch.full((2,), float(asked_to_stop), dtype=torch.float64, device=sums.loss.device)
    flags[0] = ~gradients_finite
    # All of it in one tensor: one collective, and one copy to the host.
    together = torch.cat((sums.loss, sums.tokens, flags))
    languages = len(sums.loss)
    with waiting_for("the losses of all ranks", on_peers=True):
        dist.all_reduce(together)
        loss, tokens, flags = together.cpu().split((languages, languages, 2))
    not_finite, asked = flags.tolist()
    return Agreed(LossSums(loss, tokens), not not_finite, bool(asked))
