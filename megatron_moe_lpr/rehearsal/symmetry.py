"""Ranks that were not rehearsed, each stood in for by a rehearsed rank of its kind.

The rule. A rank that was not rehearsed is taken to make the calls of a rehearsed rank of the same pipeline stage, each
on its own group of that name. Of several rehearsed ranks of the stage that one stands in whose TP, EP and DP
coordinates are most like its own: the same, or else both the first, both the last, both in between. The ranks of a
stage of which none was rehearsed have no stand-in: other ranks never wait for them. Only numbers that depend on the
data (the split sizes of an all_to_all) are not taken over.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.rehearsal.findings import POINT_TO_POINT
from megatron_moe_lpr.rehearsal.record import Collective, RankRecord


@dataclasses.dataclass(frozen=True)
class Axes:
    """The coordinates of ranks: number r has a digit for each axis, the first axis fastest (Megatron's RankGenerator,
    order tp-cp-ep-dp-pp)."""

    sizes: tuple[int, ...]

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """The digits of a rank."""
        digits = []
        for size in self.sizes:
            rank, digit = divmod(rank, size)
            digits.append(digit)
        return tuple(digits)

    def rank(self, coordinates: Sequence[int]) -> int:
        """The rank with these digits."""
        return sum(digit * math.prod(self.sizes[:place]) for place, digit in enumerate(coordinates))


@dataclasses.dataclass(frozen=True)
class World:
    """All ranks of a run with their coordinates: those of the dense layers and those of the new experts."""

    layout: ParallelLayout
    size: int

    @functools.cached_property
    def dense(self) -> Axes:
        """TP, DP, PP."""
        layout = self.layout
        return Axes(
            (
                layout.tensor_model_parallel_size,
                layout.data_parallel_size(self.size),
                layout.pipeline_model_parallel_size,
            )
        )

    @functools.cached_property
    def expert(self) -> Axes:
        """Expert TP, EP, expert DP, PP."""
        layout = self.layout
        ranks = (
            layout.expert_tensor_parallel_size,
            layout.expert_model_parallel_size,
            layout.pipeline_model_parallel_size,
        )
        return Axes((*ranks[:2], self.size // math.prod(ranks), ranks[2]))

    def stage(self, rank: int) -> int:
        """The pipeline stage of a rank."""
        return self.dense.coordinates(rank)[2]

    def data_parallel_rank(self, rank: int) -> int:
        """A rank's place in its data-parallel group."""
        return self.dense.coordinates(rank)[1]

    def likeness(self, rank: int, other: int) -> int:
        """How much the coordinates of two ranks of a pipeline stage are alike, TP most, then EP, then DP."""
        total = 0
        pairs = [(self.dense, 0), (self.expert, 1), (self.dense, 1)]
        for axes, place in pairs:
            mine, theirs = axes.coordinates(rank)[place], axes.coordinates(other)[place]
            last = axes.sizes[place] - 1
            same_end = (mine == 0, mine == last) == (theirs == 0, theirs == last)
            total = total * 3 + (2 if mine == theirs else int(same_end))
        return total

    @functools.cache  # noqa: B019  a World lives as long as its report
    def moved(self, ranks: tuple[int, ...], rank: int) -> tuple[int, ...] | None:
        """The group of which `rank` is a member and which varies in the coordinates in which the group `ranks` does.

        None: the group has no such shape in this world.
        """
        for axes, values in self._shapes(ranks):
            own = axes.coordinates(rank)
            if all(found is None or digit in found for found, digit in zip(values, own, strict=True)):
                chosen = [found or (digit,) for found, digit in zip(values, own, strict=True)]
                # The first axis is the fastest: ranks come out in their order.
                return tuple(axes.rank(digits[::-1]) for digits in itertools.product(*reversed(chosen)))
        return None

    @functools.cache  # noqa: B019
    def neighbour(self, source: int, peer: int, rank: int) -> int:
        """The rank that is as many steps from `rank` along each axis as `peer` is from `source`: the next stage of the
        pipeline, or another rank of a data-parallel group."""
        digits = zip(*map(self.dense.coordinates, (source, peer, rank)), self.dense.sizes, strict=True)
        return self.dense.rank([(own + there - here) % size for here, there, own, size in digits])

    @functools.cache  # noqa: B019
    def _shapes(self, ranks: tuple[int, ...]) -> list[tuple[Axes, list[tuple[int, ...] | None]]]:
        """How a group lies in the world: by axis its values, None where all ranks have the same one.

        Shapes that take all values of their axes come first: those that take some, as the group of the first and the
        last pipeline stage does, may also be a group of the other kind of axes.
        """
        found = []
        for axes in (self.dense, self.expert):
            members = list(map(axes.coordinates, ranks))
            values = [tuple(sorted(set(digits))) for digits in zip(*members, strict=True)]
            if math.prod(map(len, values)) == len(ranks) and tuple(sorted(ranks)) == ranks:
                found.append((axes, [several if len(several) > 1 else None for several in values]))
        return sorted(
            found, key=lambda shape: any(v and len(v) < s for v, s in zip(shape[1], shape[0].sizes, strict=True))
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """The calls of a rank: its own, or a stand-in's."""

    rank: int
    record: RankRecord
    world: World | None = None

    @property
    def is_rehearsed(self) -> bool:
        """Whether the calls were recorded on this rank."""
        return self.rank == self.record.rank

    def group(self, call: Collective) -> tuple[int, ...] | None:
        """Global ranks of the group on which this rank makes the call; None: not known."""
        if self.is_rehearsed or self.world is None or len(call.ranks) == self.world.size:
            return call.ranks
        return self.world.moved(call.ranks, self.rank)

    def peer(self, call: Collective) -> int | None:
        """The global rank at the other end, or the root."""
        if self.is_rehearsed or self.world is None or call.peer is None:
            return call.peer
        if call.kind in POINT_TO_POINT:
            return self.world.neighbour(self.record.rank, call.peer, self.rank)
        group = self.group(call)
        return call.peer if group is None else group[call.ranks.index(call.peer)]

    def call(self, call: Collective) -> Collective:
        """The call as this rank makes it."""
        if self.is_rehearsed:
            return call
        return dataclasses.replace(
            call, ranks=self.group(call) or call.ranks, peer=self.peer(call), sizes=None, received=None
        )


def all_parts(records: Sequence[RankRecord], world: World | None = None) -> dict[int, Part]:
    """What every rank does, by its rank: rehearsed ranks, and with `world` also the ranks that these stand in for."""
    parts = {record.rank: Part(record.rank, record, world) for record in records}
    if world is None:
        return parts
    by_stage: dict[int, list[RankRecord]] = {}
    for record in records:
        by_stage.setdefault(world.stage(record.rank), []).append(record)
    for rank in range(world.size):
        candidates = by_stage.get(world.stage(rank))
        if rank not in parts and candidates:
            stand_in = max(candidates, key=lambda record: (world.likeness(rank, record.rank), -record.rank))
            parts[rank] = Part(rank, stand_in, world)
    return dict(sorted(parts.items()))
