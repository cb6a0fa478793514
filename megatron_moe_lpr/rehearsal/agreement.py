"""Whether rehearsed ranks would meet: the same collectives in every group, matching sizes, no waiting in a ring.

Each phase of a run (`record.PHASES`) is checked by itself, as if all ranks began it together.
"""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_moe_lpr.rehearsal.calls import Group, Member, Program, members_of_groups, programs_of_phase
from megatron_moe_lpr.rehearsal.findings import Finding, Findings, name_call, name_payload
from megatron_moe_lpr.rehearsal.order import call_meanwhile, find_rings
from megatron_moe_lpr.rehearsal.record import PHASES, Collective, RankRecord
from megatron_moe_lpr.rehearsal.sizes import check_pairs, check_split_sizes
from megatron_moe_lpr.rehearsal.symmetry import World, all_parts

UNEQUAL_BYTES = ("all_to_all", "gather", "scatter")
"""Kinds in which the members of a group hand in unequal numbers of bytes."""
COMPARED_CALLS = 200
"""Calls behind a difference by which is decided which rank skips one: the time grows with their square."""


def check_agreement(records: Sequence[RankRecord], world: World | None = None) -> list[Finding]:
    """Find collectives on which ranks disagree, and ranks that wait for each other.

    Args:
        records: of all ranks, or of a sample.
        world: the run's layout, by which rehearsed ranks stand in for the others (`symmetry`); None: only rehearsed
            ranks are compared, and none waits for another one.

    Returns:
        The findings of each phase, in the order of the phases; empty: the ranks agree.
    """
    parts = all_parts(records, world)
    found: list[Finding] = []
    for phase in PHASES:
        findings = Findings(phase)
        programs = programs_of_phase(parts, phase)
        broken = _check_groups(programs, findings)
        broken |= check_pairs(programs, findings)
        find_rings(programs, broken, findings)
        found += findings
    return found


def _check_groups(programs: Mapping[int, Program], findings: Findings) -> set[Group]:
    """Compare the calls of every group's members; return the groups in which not all make the same calls."""
    fit: dict[frozenset, bool] = {}
    broken = set()
    for group, members in members_of_groups(programs).items():
        # Groups whose members have the calls of the same rehearsed ranks are alike.
        origins = frozenset(member.origin for member in members)
        if not fit.get(origins, len(origins) == 1):
            fit[origins] = _fits(programs, members, findings)
            if not fit[origins]:
                broken.add(group)
                continue
        check_split_sizes(members, findings)
    return broken


def _fits(programs: Mapping[int, Program], members: Sequence[Member], findings: Findings) -> bool:
    """Compare the calls of a group's members with those of most; return whether kinds and number are the same."""
    speakers = {member.origin: member for member in reversed(members)}
    contents = {origin: tuple(map(_content, speaker.calls)) for origin, speaker in speakers.items()}
    counted = Counter(contents[member.origin] for member in members)
    usual = max(counted.values())
    reference = next(member for member in members if counted[contents[member.origin]] == usual)
    expected = contents[reference.origin]
    unlike = [member for member in speakers.values() if contents[member.origin] != expected]
    alike = [_compare(programs, reference, member, findings) for member in unlike[::-1]]
    return all(alike)


def _content(call: Collective) -> tuple:
    """What must be the same on all members of a group."""
    has_equal_bytes = call.kind not in UNEQUAL_BYTES and not call.kind.endswith("_object")
    root = None if call.peer is None else call.ranks.index(call.peer)
    return call.kind, call.dtype, call.bytes if has_equal_bytes else None, root


def _compare(programs: Mapping[int, Program], reference: Member, member: Member, findings: Findings) -> bool:
    """Report the first difference between the calls of two members; return whether kinds and number are the same."""
    ours, theirs = reference.calls, member.calls
    if [call.kind for call in ours] == [call.kind for call in theirs]:
        pairs = zip(ours, theirs, strict=True)
        place = next(place for place, (mine, other) in enumerate(pairs) if _content(mine) != _content(other))
        _report_contents(reference.rank, reference.call(place), member.rank, member.call(place), findings)
        return True
    place, is_missing = _first_difference(ours, theirs)
    waiting, skipping = (member, reference) if is_missing else (reference, member)
    _report_kinds(programs, waiting, place, skipping, findings)
    return False


def _report_kinds(
    programs: Mapping[int, Program], waiting: Member, place: int, skipping: Member, findings: Findings
) -> None:
    call = waiting.call(place)
    cause = ("kinds", call.kind, call.site)
    if findings.count(cause):
        return
    meanwhile = call_meanwhile(programs, skipping.rank, waiting.rank, waiting.places[place])
    where = f"is in {name_call(meanwhile)}" if meanwhile else "has ended"
    numbers = f"{len(waiting.calls):,} and {len(skipping.calls):,}"
    findings.add(
        cause,
        f"rank {waiting.rank} waits in {name_call(call)}, rank {skipping.rank} {where}; "
        f"of their calls in this group there are {numbers}",
    )


def _first_difference(ours: Sequence[Collective], theirs: Sequence[Collective]) -> tuple[int, bool]:
    """The place at which two unlike sequences part, and whether the call that is missing on one side is theirs.

    Sites count too: where a rank skips one of several equal calls, they alone show which.
    """
    mine, other = ([(*_content(call), call.site) for call in calls] for calls in (ours, theirs))
    shorter = min(len(mine), len(other))
    place = next((place for place in range(shorter) if mine[place] != other[place]), shorter)
    end = place + COMPARED_CALLS
    matcher = difflib.SequenceMatcher(None, mine[place:end], other[place:end], autojunk=False)
    return place, matcher.get_opcodes()[0][0] == "insert"


def _report_contents(rank: int, mine: Collective, other_rank: int, other: Collective, findings: Findings) -> None:
    if mine.peer != other.peer:
        text = f"takes rank {other.peer} as the root, rank {rank} takes rank {mine.peer}"
    else:
        text = f"hands in {name_payload(other)}, rank {rank} hands in {name_payload(mine)}"
    second = "" if mine.site == other.site else f" and {other.site}"
    findings.add(("contents", mine.kind, mine.site, other.site), f"rank {other_rank} {text}: {name_call(mine)}{second}")
