"""Ranks that wait for each other in a ring, found by a simulated execution of all ranks' calls.

A collective ends when all its members have reached it, also where it is asynchronous: communicators whose calls
overlap must be used in one order on all ranks. A send and its receive end when both have been posted; a rank goes on
behind them until it waits for them.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Set

from megatron_moe_lpr.rehearsal.calls import Group, Program
from megatron_moe_lpr.rehearsal.findings import POINT_TO_POINT, Findings, name_call
from megatron_moe_lpr.rehearsal.record import Collective
from megatron_moe_lpr.rehearsal.sizes import Channel, channel


class _Rank:
    """How far a rank is."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.place = 0
        """The next call."""
        self.posted: list[tuple[int, Channel, int]] = []
        """Sends and receives not yet waited for: place, channel, and the how manieth of its end."""
        self.blocked: int | None = None
        """Place of the call in which it waits; None: it has ended."""


class _Execution:
    """A simulated execution of all ranks."""

    def __init__(self, programs: Mapping[int, Program], held: tuple[int, int] | None = None) -> None:
        """`held` never gets beyond a call: its rank and place."""
        self.held = held
        self.ranks = {rank: _Rank(program) for rank, program in programs.items()}
        self.arrived: dict[Group, dict[int, None]] = {}
        """Ranks that have reached the next collective of a group."""
        self.members = {
            group: sum(rank in programs for rank in group.ranks)
            for group in dict.fromkeys(group for program in programs.values() for group in program.groups)
            if group is not None
        }
        self.counts: dict[tuple[Channel, str], int] = {}
        """Sends and receives that have been posted."""
        self.ready = deque(programs)

    def run(self) -> None:
        """Run until every rank has ended or waits."""
        while self.ready:
            self._advance(self.ranks[self.ready.popleft()])

    def _advance(self, rank: _Rank) -> None:
        """Run a rank until it waits."""
        calls, waits = rank.program.recorded.calls, rank.program.recorded.waits
        while True:
            rank.blocked = next(self._unmatched(rank, waits), None) if rank.posted else None
            if rank.blocked is not None or rank.place == len(calls):
                return
            if (rank.program.rank, rank.place) == self.held:
                rank.blocked = rank.place
                return
            if rank.posted:
                rank.posted = [entry for entry in rank.posted if waits[entry[0]] > rank.place]
            if calls[rank.place].kind in POINT_TO_POINT:
                self._post(rank)
                rank.place += 1
            elif not self._meet(rank):
                return

    def _unmatched(self, rank: _Rank, waits: list[int]) -> Iterator[int]:
        """Places of sends and receives for which the rank waits now and whose other end has not been posted."""
        for place, found, number in rank.posted:
            if waits[place] <= rank.place:
                other = "recv" if rank.program.recorded.calls[place].kind == "send" else "send"
                if self.counts.get((found, other), 0) <= number:
                    yield place

    def _post(self, rank: _Rank) -> None:
        found, kind = channel(rank.program, rank.place), rank.program.recorded.calls[rank.place].kind
        if found is None or found[0] not in self.ranks or found[1] not in self.ranks:
            return
        number = self.counts.get((found, kind), 0)
        self.counts[found, kind] = number + 1
        rank.posted.append((rank.place, found, number))
        self.ready.append(found[1] if kind == "send" else found[0])

    def _meet(self, rank: _Rank) -> bool:
        """Reach a collective; return whether all its members have."""
        group = rank.program.group(rank.place)
        waiting = self.arrived.setdefault(group, {}) if group else {}
        waiting[rank.program.rank] = None
        if group and len(waiting) < self.members[group]:
            rank.blocked = rank.place
            return False
        for other in waiting:
            self.ranks[other].place += 1
            self.ranks[other].blocked = None
            self.ready.append(other)
        waiting.clear()
        return True

    def awaited_by(self, rank: int) -> Iterator[int]:
        """The ranks for which a rank waits."""
        state = self.ranks[rank]
        if state.blocked is None:
            return
        call, group = state.program.recorded.calls[state.blocked], state.program.group(state.blocked)
        if call.kind in POINT_TO_POINT:
            peer = state.program.part.peer(call)
            if peer is not None:
                yield peer
        elif group is not None:
            arrived = self.arrived[group]
            yield from (member for member in group.ranks if member in self.ranks and member not in arrived)


def call_meanwhile(programs: Mapping[int, Program], rank: int, waiting: int, place: int) -> Collective | None:
    """The call in which `rank` is while the rank `waiting` waits in its call number `place`; None: it has ended."""
    execution = _Execution(programs, (waiting, place))
    execution.run()
    blocked = execution.ranks[rank].blocked
    return None if blocked is None else programs[rank].call(blocked)


def find_rings(programs: Mapping[int, Program], broken: Set[Group], findings: Findings) -> None:
    """Report ranks that wait for each other in a ring.

    Args:
        broken: groups in which ranks disagree, as is reported already: rings through these are a consequence.
    """
    execution = _Execution(programs)
    execution.run()
    found = False
    for ring in _rings(execution):
        found = True
        states = [execution.ranks[rank] for rank in ring]
        places = [state.blocked for state in states if state.blocked is not None]
        keys = {state.program.group(place) for state, place in zip(states, places, strict=True)}
        if not keys & broken:
            calls = [state.program.call(place) for state, place in zip(states, places, strict=True)]
            _report_ring(ring, calls, findings)
    if not found and not broken:
        _report_stuck(execution, findings)


def _rings(execution: _Execution) -> Iterator[list[int]]:
    """Rings of ranks each of which waits for the next one, by a search in depth; not every ring, but one if any."""
    done: set[int] = set()
    for start in execution.ranks:
        path, choices = [start], [execution.awaited_by(start)]
        while path:
            following = None if path[-1] in done else next(choices[-1], None)
            if following is None:
                done.add(path.pop())
                choices.pop()
            elif following in path:
                yield path[path.index(following) :]
                done.update(path)
            elif following not in done:
                path.append(following)
                choices.append(execution.awaited_by(following))


def _report_ring(ring: list[int], calls: list[Collective], findings: Findings) -> None:
    waits = [
        f"rank {rank} waits in {name_call(call)} for rank {other}"
        for rank, call, other in zip(ring, calls, (*ring[1:], ring[0]), strict=True)
    ]
    findings.add(("ring", *sorted((call.kind, call.site) for call in calls)), f"deadlock: {', '.join(waits)}")


def _report_stuck(execution: _Execution, findings: Findings) -> None:
    """Report ranks that wait for one that has ended, where nothing else says why."""
    for rank, state in execution.ranks.items():
        if state.blocked is not None:
            call = state.program.call(state.blocked)
            ended = [other for other in execution.awaited_by(rank) if execution.ranks[other].blocked is None]
            if ended:
                findings.add(("stuck", call.site), f"rank {rank} waits in {name_call(call)}, rank {ended[0]} has ended")
