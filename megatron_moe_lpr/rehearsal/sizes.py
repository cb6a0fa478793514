"""Whether what a rank sends is what the other end expects: sends and receives, split sizes of an all_to_all."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from megatron_moe_lpr.rehearsal.calls import Group, Member, Program
from megatron_moe_lpr.rehearsal.findings import POINT_TO_POINT, Findings, name_call, name_payload
from megatron_moe_lpr.rehearsal.record import Collective

Channel: TypeAlias = tuple[int, int, Group]
"""Sends from one rank to another on one communicator: the receives there take them in order."""


def channel(program: Program, place: int) -> Channel | None:
    """Where a send or receive is matched; None: not known."""
    group = program.group(place)
    if group is None:
        return None
    call = program.recorded.calls[place]
    peer = program.part.peer(call)
    assert peer is not None
    return (program.rank, peer, group) if call.kind == "send" else (peer, program.rank, group)


def check_pairs(programs: Mapping[int, Program], findings: Findings) -> set[Group]:
    """Compare sends with receives, in order; return the groups in which one is without its other end."""
    sends: dict[Channel, list[int]] = {}
    receives: dict[Channel, list[int]] = {}
    for program in programs.values():
        for place, call in enumerate(program.recorded.calls):
            if call.kind in POINT_TO_POINT and (found := channel(program, place)) is not None:
                (sends if call.kind == "send" else receives).setdefault(found, []).append(place)
    broken = set()
    for found in sends.keys() | receives.keys():
        source, target, group = found
        if source not in programs or target not in programs:
            continue
        ends = (sends.get(found, ()), receives.get(found, ()))
        pairs = itertools.zip_longest(*ends)
        if not _check_channel(programs[source], programs[target], pairs, findings):
            broken.add(group)
    return broken


def _check_channel(source: Program, target: Program, pairs: itertools.zip_longest, findings: Findings) -> bool:
    """Report the first pair that does not fit; return whether every send has a receive."""
    for sent_at, received_at in pairs:
        if sent_at is None or received_at is None:
            sent = None if sent_at is None else source.call(sent_at)
            received = None if received_at is None else target.call(received_at)
            _report_single(source.rank, target.rank, sent, received, findings)
            return False
        sent, received = source.recorded.calls[sent_at], target.recorded.calls[received_at]
        if (sent.dtype, sent.bytes) != (received.dtype, received.bytes):
            findings.add(
                ("pair", sent.site, received.site),
                f"rank {source.rank} sends {name_payload(sent)}, rank {target.rank} expects {name_payload(received)}: "
                f"{name_call(source.call(sent_at))}, {name_call(target.call(received_at))}",
            )
            return True
    return True


def _report_single(
    source: int, target: int, sent: Collective | None, received: Collective | None, findings: Findings
) -> None:
    call = sent or received
    assert call is not None
    waiting, other, lacks = (source, target, "receives") if sent else (target, source, "sends")
    text = f"rank {waiting} waits in {name_call(call)}, rank {other} {lacks} nothing more"
    findings.add(("single", call.kind, call.site), text)


def check_split_sizes(members: Sequence[Member], findings: Findings) -> None:
    """Compare what each rank of a group sends to each other in an all_to_all with what that one expects.

    Only between rehearsed ranks: the sizes depend on the data.
    """
    known = [member for member in members if member.program.part.is_rehearsed]
    if len(known) < 2 or not any(call.kind == "all_to_all" for call in known[0].calls):
        return
    group = known[0].calls[0].ranks
    order = {rank: place for place, rank in enumerate(group)}
    for calls in zip(*(member.calls for member in known), strict=True):
        if calls[0].kind == "all_to_all":
            made = {member.rank: call for member, call in zip(known, calls, strict=True)}
            _compare_sizes(made, order, findings)


def _compare_sizes(made: Mapping[int, Collective], order: Mapping[int, int], findings: Findings) -> None:
    for source, target in itertools.product(made, repeat=2):
        sent = _elements(made[source], made[source].sizes)[order[target]]
        expected = _elements(made[target], made[target].received)[order[source]]
        if sent != expected:
            second = "" if made[source].site == made[target].site else f" and {made[target].site}"
            findings.add(
                ("split", made[source].site, made[target].site),
                f"rank {source} sends {sent:,} elements to rank {target}, which expects {expected:,}: "
                f"{name_call(made[source])}{second}",
            )


def _elements(call: Collective, sizes: tuple[int, ...] | None) -> tuple[int, ...]:
    """Elements for each rank of the group; without split sizes all get as many."""
    if sizes is not None:
        return sizes
    count = len(call.ranks)
    return (call.bytes // _item_bytes(call.dtype) // count,) * count


def _item_bytes(dtype: str) -> int:
    """Bytes of an element of a torch dtype, by its name: bfloat16, float8_e4m3fn, bool."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1
