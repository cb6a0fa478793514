"""A rehearsed rank's memory against what the planner says of it."""

import dataclasses

from megatron_moe_lpr.planning.memory import GIB, rank_memory
from megatron_moe_lpr.rehearsal.rank import Rehearsed
from megatron_moe_lpr.rehearsal.simulated_run import planned_recompute, planned_run
from megatron_moe_lpr.training.configuration.config import TrainingConfig

TOLERANCE = 0.05
"""Largest difference that is not remarked on, as a share of the plan's figure."""
UNREMARKED = 16 << 20
"""Bytes; smaller differences are not remarked on either: buffers are padded."""
PLACES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a rank's memory."""

    name: str
    rehearsed: int
    planned: float | None
    """None: the planner has no figure."""

    @property
    def difference(self) -> float | None:
        """Share by which the rehearsal is above the plan."""
        return self.rehearsed / self.planned - 1 if self.planned else None

    @property
    def differs(self) -> bool:
        """Whether rehearsal and plan are further apart than `TOLERANCE`."""
        if self.planned is None:
            return False
        return abs(self.rehearsed - self.planned) > max(TOLERANCE * self.planned, UNREMARKED)


def compare(config: TrainingConfig, rehearsed: Rehearsed, world_size: int) -> list[Part]:
    """Return each part of the rank's memory, and their sum last."""
    memory = rehearsed.record.memory
    plan = rank_memory(planned_run(config, rehearsed, world_size), rehearsed.coordinates["pp"])
    activations = plan.activations + plan.logits if planned_recompute(config) else None
    planned = {
        "parameters": plan.weights,
        "gradients": plan.gradients,
        "optimizer": plan.optimizer,
        "activations": activations,
    }
    parts = [Part(name, memory[name], value) for name, value in planned.items()]
    total = None if activations is None else plan.total - plan.reserved
    return [*parts, Part("together", sum(memory.values()), total)]


def remarks(rehearsed: Rehearsed, parts: list[Part]) -> list[str]:
    """Return a line for each part that differs from the plan, which says where the memory is."""
    lines = []
    for part in parts:
        if not part.differs or part.planned is None or part.difference is None:
            continue
        line = (
            f"rank {rehearsed.record.rank}: {part.name} {part.rehearsed / GIB:,.2f} GiB, planned "
            f"{part.planned / GIB:,.2f} ({part.difference:+.0%})"
        )
        if part.name == "activations":
            places = [(place, size) for place, size in rehearsed.at_peak.most_common() if place][:PLACES_SHOWN]
            line += "; most at the peak: " + ", ".join(f"{size / GIB:,.2f} GiB of {place}" for place, size in places)
        lines.append(line)
    return lines
