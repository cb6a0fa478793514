"""Notes that ranks write about themselves for each other, and the messages that name a rank that hangs."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from types import FrameType

import torch.distributed as dist

PREFIX = "moe_lpr/heartbeat"
FINDINGS = f"{PREFIX}/findings"
SHOWN = 4
STACK_SIGNAL = signal.SIGUSR2
"""Signal on which data loader processes print their stack."""
STACK_SECONDS = 0.5
"""Time that data loader processes get to print their stack."""


@dataclasses.dataclass(frozen=True)
class Note:
    """State of a rank as its own watch thread writes it."""

    beat: int
    step: int
    place: str
    host: str
    process: int
    still: float = 0.0
    """Seconds without progress."""
    waits_for_peers: bool = False
    doing: str | None = None
    in_long_work: bool = False

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, last seen in step {self.step} at {self.place}"

    def where(self) -> str:
        """What the rank is doing, if known, and where in the code."""
        return f"{self.doing}, at {self.place}" if self.doing else f"at {self.place}"


class NoteBoard:
    """The notes of all ranks, kept in the TCPStore of torch.distributed."""

    def __init__(self, store: dist.Store, world: int) -> None:
        self.store, self.world = store, world
        self.unknown = list(range(world))
        """Ranks of which no note was seen yet."""

    @staticmethod
    def connect(world: int) -> "NoteBoard | None":
        """Open a connection of its own to the store: a main thread that waits in the store blocks the other connection.

        Returns:
            None: the ranks did not meet in a TCPStore.
        """
        store = dist.distributed_c10d._get_default_store()
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if not isinstance(store, dist.TCPStore):
            return None
        # torch's type stubs lack `clone`.
        return NoteBoard(store.clone(), world)  # type: ignore[attr-defined]

    def write(self, rank: int, note: Note) -> None:
        """Replace this rank's note."""
        self.store.set(_key(rank), json.dumps(dataclasses.asdict(note)))

    def read(self) -> dict[int, Note]:
        """The notes of all ranks that have written one, in a single message."""
        if self.unknown and self.store.check([_key(rank) for rank in self.unknown]):
            self.unknown = []
        self.unknown = [rank for rank in self.unknown if not self.store.check([_key(rank)])]
        known = sorted(set(range(self.world)).difference(self.unknown))
        notes = self.store.multi_get([_key(rank) for rank in known])
        return {rank: Note(**json.loads(note)) for rank, note in zip(known, notes, strict=True)}

    def findings(self) -> str:
        """What a rank has found in the notes of all (`examination.Findings`); empty: none examines them."""
        return self.store.get(FINDINGS).decode() if self.store.check([FINDINGS]) else ""

    def exchange_findings(self, before: str, after: str) -> str:
        """Replace the findings `before`, unless another rank was faster. Returns the findings that are there then."""
        return self.store.compare_set(FINDINGS, before, after).decode()


def _key(rank: int) -> str:
    return f"{PREFIX}/{rank}"


def silent_ranks_line(rank: int, notes: Mapping[int, Note], silent: list[int]) -> str:
    """The error of a rank that waits for ranks which do not update their notes any more."""
    mine = notes[rank]
    named = "; ".join(f"rank {other} ({notes[other]})" for other in silent[:SHOWN])
    more = f" and {len(silent) - SHOWN} more" if len(silent) > SHOWN else ""
    return (
        f"error: step {mine.step}: no answer from {named}{more}: stopped or dead; rank {rank} waits at {mine.place} "
        f"for {mine.still:.0f} s. Start again to go on from the last checkpoint"
    )


def slow_line(rank: int, notes: Mapping[int, Note]) -> str:
    """The warning of a rank that has made no progress for long, while all ranks update their notes."""
    mine = notes[rank]
    places: dict[str, list[int]] = {}
    for other, note in notes.items():
        places.setdefault(f"step {note.step} {note.where()}", []).append(other)
    rare = sorted(places.items(), key=lambda item: len(item[1]))[:SHOWN]
    named = "; ".join(f"ranks {', '.join(map(str, ranks[:SHOWN]))} in {place}" for place, ranks in rare)
    return (
        f"warning: step {mine.step}: rank {rank} waits at {mine.place} for {mine.still:.0f} s, and every rank answers: "
        f"{named}"
    )


def hang_line(rank: int, mine: Note, culprits: Mapping[int, Note], timeout: float) -> str:
    """The error of a rank that ends because no rank makes progress.

    Args:
        mine: its own note.
        culprits: ranks that hang without waiting for another rank.
        timeout: --distributed-timeout-minutes, in seconds.
    """
    if rank in culprits:
        what = f"rank {rank} hangs {mine.where()}: no progress for {mine.still:.0f} s"
    elif culprits:
        shown = list(culprits.items())[:SHOWN]
        named = "; ".join(f"rank {other} ({note}, {note.where()})" for other, note in shown)
        what = f"rank {rank} has waited {mine.still:.0f} s at {mine.place} for {named}, which hangs"
    else:
        what = f"rank {rank} hangs at {mine.place} for {mine.still:.0f} s, as every rank waits for another"
    return (
        f"error: step {mine.step}: {what} (--distributed-timeout-minutes {timeout / 60:g}). "
        "Start again to go on from the last checkpoint"
    )


def print_stacks(frame: FrameType | None) -> None:
    """Print the stack of a thread, given its innermost frame, and the stacks of this process's data loaders."""
    with contextlib.suppress(OSError, ValueError):
        print("its stack, the innermost call last:", *traceback.format_stack(frame), sep="\n", file=sys.stderr)
        sys.stderr.flush()
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError, TypeError):
            os.kill(child.pid, STACK_SIGNAL)  # type: ignore[arg-type]
            time.sleep(STACK_SECONDS)
