"""What a rehearsal finds wrong, one line each: which ranks, in which calls, at which places of the code."""

import dataclasses
from collections.abc import Iterable, Sequence

from megatron_moe_lpr.rehearsal.record import Collective

SHOWN_RANKS = 8
"""Ranks of a group that a line names."""
POINT_TO_POINT = ("send", "recv")


@dataclasses.dataclass(frozen=True)
class Finding:
    """A fault that the records of rehearsed ranks show."""

    phase: str
    """Part of the run, see `record.PHASES`."""
    text: str
    """One line without the phase."""
    alike: int = 0
    """Further faults of the same calls between other ranks, which are not listed."""

    def __str__(self) -> str:
        more = f" (and {self.alike:,} more alike)" if self.alike else ""
        return f"{self.phase}: {self.text}{more}"


@dataclasses.dataclass
class Findings:
    """Findings in the order found, of those with the same cause only the first."""

    phase: str
    by_cause: dict[tuple, Finding] = dataclasses.field(default_factory=dict)

    def add(self, cause: tuple, text: str) -> None:
        """Add a finding, or count it where one with this cause is there."""
        if not self.count(cause):
            self.by_cause[cause] = Finding(self.phase, text)

    def count(self, cause: tuple) -> bool:
        """Count a finding with a known cause; return whether the cause is known."""
        known = self.by_cause.get(cause)
        if known:
            self.by_cause[cause] = dataclasses.replace(known, alike=known.alike + 1)
        return known is not None

    def __iter__(self):
        return iter(self.by_cause.values())


def list_ranks(ranks: Sequence[int]) -> str:
    """Ranks of a group as text; of a large group the first ones and their number."""
    if len(ranks) <= SHOWN_RANKS:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[: SHOWN_RANKS - 1]))}, ... of {len(ranks):,} ranks"


def name_call(call: Collective) -> str:
    """A call with its group and place: `all_gather (tp: 2, 3) at moe_layer.py:12 in forward`."""
    kind = call.kind
    if kind in POINT_TO_POINT:
        kind += f" {'to' if kind == 'send' else 'from'} rank {call.peer}"
    return f"{kind} ({call.group}: {list_ranks(call.ranks)}) at {call.site or 'an unknown place'}"


def name_payload(call: Collective) -> str:
    """What a call moves: `1,024 bytes of bfloat16`."""
    return f"{call.bytes:,} bytes of {call.dtype or 'no tensor'}"


def report(findings: Iterable[Finding]) -> str:
    """All findings as text, a line each."""
    return "".join(f"{finding}\n" for finding in findings)
