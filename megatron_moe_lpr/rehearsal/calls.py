"""What each rank calls in a phase, in order, and what the members of each group call on it."""

import dataclasses
from collections.abc import Mapping, Sequence

from megatron_moe_lpr.rehearsal.findings import POINT_TO_POINT
from megatron_moe_lpr.rehearsal.record import Collective, RankRecord
from megatron_moe_lpr.rehearsal.symmetry import Part


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """A communicator. Two of them may have the same ranks, and there is one object for each."""

    name: str
    ranks: tuple[int, ...]


class RecordedPhase:
    """The calls of a phase that a rehearsed rank made.

    Attributes:
        rank: the rehearsed rank.
        calls: in order.
        groups: a call on each group that is used.
        group_at: for each call the number of its group in `groups`.
        places: by number of the group, where in `calls` its collectives are; not sends and receives.
        waits: for each call before how many calls of the phase the rank waits for it; only of sends and receives is
            that later than in the call itself.
    """

    def __init__(self, record: RankRecord, phase: str) -> None:
        self.rank = record.rank
        positions = [position for position, call in enumerate(record.collectives) if call.phase == phase]
        self.calls: list[Collective] = [record.collectives[position] for position in positions]
        numbers: dict[tuple, int] = {}
        self.group_at = [numbers.setdefault((call.group, call.ranks), len(numbers)) for call in self.calls]
        self.groups = [self.calls[self.group_at.index(number)] for number in range(len(numbers))]
        self.places: dict[int, list[int]] = {}
        for place, call in enumerate(self.calls):
            if call.kind not in POINT_TO_POINT:
                self.places.setdefault(self.group_at[place], []).append(place)
        self.waits = self._waits()

    def _waits(self) -> list[int]:
        waits = [place + 1 for place in range(len(self.calls))]
        for place in reversed(range(len(self.calls))):
            call = self.calls[place]
            if call.awaited is not None:
                waits[place] = min(place + 1 + call.awaited, len(self.calls))
            elif place + 1 < len(self.calls) and _is_batched(call, self.calls[place + 1]):
                waits[place] = waits[place + 1]
        return waits


def _is_batched(call: Collective, following: Collective) -> bool:
    """Whether two calls that follow each other are of one `batch_isend_irecv`."""
    both = call.kind in POINT_TO_POINT and following.kind in POINT_TO_POINT
    return both and following.awaited is None and call.site == following.site


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a rank does in a phase."""

    part: Part
    recorded: RecordedPhase
    groups: Sequence[Group | None]
    """This rank's own groups, in the order of those of the record; None: not known."""

    @property
    def rank(self) -> int:
        """The global rank."""
        return self.part.rank

    def call(self, place: int) -> Collective:
        """One call, as this rank makes it."""
        return self.part.call(self.recorded.calls[place])

    def group(self, place: int) -> Group | None:
        """The group of one call; None: not known."""
        return self.groups[self.recorded.group_at[place]]


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """A member of a group, and where in its program its collectives on the group are."""

    program: Program
    source: int | None
    """The number of the group in the record of the rehearsed rank; None: the member never uses this group."""

    @property
    def rank(self) -> int:
        """The global rank."""
        return self.program.rank

    @property
    def origin(self) -> tuple[int, int | None]:
        """Whose calls these are: the same for all ranks that one rehearsed rank stands in for."""
        return self.program.recorded.rank, self.source

    @property
    def places(self) -> Sequence[int]:
        """Places of its collectives on the group."""
        return () if self.source is None else self.program.recorded.places[self.source]

    @property
    def calls(self) -> list[Collective]:
        """Its collectives on the group, in order, as they were recorded: with the ranks of the rehearsed rank."""
        return [self.program.recorded.calls[place] for place in self.places]

    def call(self, number: int) -> Collective:
        """One of its collectives on the group, as this rank makes it."""
        return self.program.call(self.places[number])


def programs_of_phase(parts: Mapping[int, Part], phase: str) -> dict[int, Program]:
    """What each rank does in a phase, by rank."""
    recorded = {part.record.rank: part.record for part in parts.values()}
    phases = {rank: RecordedPhase(record, phase) for rank, record in recorded.items()}
    known: dict[tuple, Group] = {}
    programs = {}
    for rank, part in parts.items():
        own = phases[part.record.rank]
        groups: list[Group | None] = []
        for call in own.groups:
            ranks = part.group(call)
            groups.append(known.setdefault((call.group, ranks), Group(call.group, ranks)) if ranks else None)
        programs[rank] = Program(part, own, groups)
    return programs


def members_of_groups(programs: Mapping[int, Program]) -> dict[Group, list[Member]]:
    """The members of every group on which a collective is called, those without a program left out, in rank order."""
    sources: dict[Group, dict[int, int]] = {}
    for program in programs.values():
        for number in program.recorded.places:
            group = program.groups[number]
            if group is not None:
                sources.setdefault(group, {})[program.rank] = number
    return {
        group: [Member(programs[rank], found.get(rank)) for rank in group.ranks if rank in programs]
        for group, found in sources.items()
    }
