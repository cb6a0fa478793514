"""What ranks write of themselves for each other, and the lines that say which one hangs."""

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
SHOWN = 4
STACK_SIGNAL = signal.SIGUSR2
"""Data loader processes print their stack when they get it."""
STACK_SECONDS = 0.5
"""How long they may take for it."""


@dataclasses.dataclass(frozen=True)
class Note:
    """What a rank says of itself."""

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
        """What it does, and the place in the code."""
        return f"{self.doing}, at {self.place}" if self.doing else f"at {self.place}"


class NoteBoard:
    """The notes of all ranks, in the store that they met in."""

    def __init__(self, store: dist.Store, world: int) -> None:
        self.store, self.world = store, world

    @staticmethod
    def connect(world: int) -> "NoteBoard | None":
        """By a connection of its own: a main thread that waits in the store keeps the other one busy. None: the ranks
        did not meet in a TCPStore."""
        store = dist.distributed_c10d._get_default_store()
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if not isinstance(store, dist.TCPStore):
            return None
        # torch's stubs leave it out.
        return NoteBoard(store.clone(), world)  # type: ignore[attr-defined]

    def write(self, rank: int, note: Note) -> None:
        """Replace this rank's note."""
        self.store.set(f"{PREFIX}/{rank}", json.dumps(dataclasses.asdict(note)))

    def read(self) -> dict[int, Note]:
        """The notes of all ranks that have written one."""
        keys = [f"{PREFIX}/{rank}" for rank in range(self.world)]
        known = [rank for rank, key in enumerate(keys) if self.store.check([key])]
        return {rank: Note(**json.loads(self.store.get(keys[rank]))) for rank in known}


def silence_line(rank: int, notes: Mapping[int, Note], silent: list[int]) -> str:
    """The error of a rank that waits for others whose notes stand still."""
    mine = notes[rank]
    named = "; ".join(f"rank {other} ({notes[other]})" for other in silent[:SHOWN])
    more = f" and {len(silent) - SHOWN} more" if len(silent) > SHOWN else ""
    return (
        f"error: step {mine.step}: no answer from {named}{more}: stopped or dead; rank {rank} waits at {mine.place} "
        f"for {mine.still:.0f} s. Start again to go on from the last checkpoint"
    )


def slow_line(rank: int, notes: Mapping[int, Note]) -> str:
    """The warning of a rank that has made no progress for long, though every rank answers."""
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


def hang_line(rank: int, notes: Mapping[int, Note], culprits: list[int], timeout: float) -> str:
    """The error of a rank that ends because no rank makes progress.

    Args:
        culprits: ranks that wait for no other rank.
        timeout: in seconds.
    """
    mine = notes[rank]
    if rank in culprits:
        what = f"rank {rank} hangs {mine.where()}: no progress for {mine.still:.0f} s"
    elif culprits:
        named = "; ".join(f"rank {other} ({notes[other]}, {notes[other].where()})" for other in culprits[:SHOWN])
        what = f"rank {rank} has waited {mine.still:.0f} s at {mine.place} for {named}, which hangs"
    else:
        what = f"rank {rank} hangs at {mine.place} for {mine.still:.0f} s, as every rank waits for another"
    return (
        f"error: step {mine.step}: {what} (--distributed-timeout-minutes {timeout / 60:g}). "
        "Start again to go on from the last checkpoint"
    )


def print_stacks(frame: FrameType | None) -> None:
    """On standard error: the stack of a thread, given its innermost frame, and those of this process's data loaders."""
    with contextlib.suppress(OSError, ValueError):
        print("its stack, the innermost call last:", *traceback.format_stack(frame), sep="\n", file=sys.stderr)
        sys.stderr.flush()
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError, TypeError):
            os.kill(child.pid, STACK_SIGNAL)  # type: ignore[arg-type]
            time.sleep(STACK_SECONDS)
