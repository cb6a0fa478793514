"""Which rank hangs, and where: told by those that wait for it.

A thread of each rank notes every few seconds, in the store that the ranks met in, that it lives and where the rank's
main thread is. The step itself does nothing for it. A rank whose main thread has not moved for most of the timeout
looks at the notes of all: a rank whose notes stand still is stopped or dead. That holds for gloo and NCCL alike; with
NCCL the collective's own timeout would end the process without Python hearing of it.
"""

import dataclasses
import json
import math
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform.collectives import is_collective_failure

PREFIX = "moe_lpr/heartbeat"
PATIENCE = 0.75
"""Share of the timeout after which a rank asks what it waits for."""
BEATS_A_TIMEOUT = 60
LONGEST_PERIOD = 10.0
SILENCE_SECONDS = 10.0
"""A rank without a beat for so long (and three periods) does not answer: a busy machine takes its time."""
SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Note:
    """What a rank says of itself."""

    beat: int
    step: int
    place: str
    host: str
    process: int

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, last seen in step {self.step} at {self.place}"


class Heartbeat:
    """Beats inside a `with` block of the main thread, where there are several ranks that met in a TCPStore."""

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds after which a collective fails."""
        self.step, self.beats = 0, 0
        self.timeout, self.period = timeout, min(LONGEST_PERIOD, timeout / BEATS_A_TIMEOUT)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.main = threading.get_ident()
        self.ended = threading.Event()
        store = _own_connection() if self.world > 1 else None
        self.thread = threading.Thread(target=self._beat, args=(store,), daemon=True) if store else None

    def __enter__(self) -> "Heartbeat":
        if self.thread:
            self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Raises UserError where a collective of the block has failed: a peer ended or took too long."""
        self.ended.set()
        if self.thread:
            self.thread.join(self.period)
        if is_collective_failure(error):
            place, _ = _place(_innermost(trace))
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"step {self.step}: rank {self.rank} lost another rank at {place} ({reason}); what the rank says that "
                "ended first is the cause"
            ) from error

    def _beat(self, store: dist.Store) -> None:
        still, last, told = 0, None, False
        while not self.ended.wait(self.period):
            here = (self.step, *_place(sys._current_frames().get(self.main)))
            # Counted in beats, not by the clock: a job that is suspended as a whole has not waited.
            still, told = (still + 1, told) if here == last else (0, False)
            last = here
            try:
                self._note(store, here[1])
                if not told and still * self.period >= PATIENCE * self.timeout:
                    told = True
                    self._look(store, still * self.period, here[1])
            except (dist.DistError, RuntimeError):
                return  # the store went with the rank or launcher that kept it: they are ending

    def _note(self, store: dist.Store, place: str) -> None:
        self.beats += 1
        note = Note(self.beats, self.step, place, socket.gethostname(), os.getpid())
        store.set(f"{PREFIX}/{self.rank}", json.dumps(dataclasses.asdict(note)))

    def _look(self, store: dist.Store, waited: float, place: str) -> None:
        """End this process where another rank does not answer; else say where all are, and leave it to the timeout."""
        before = self._notes(store)
        self._beat_on(store, max(3 * self.period, SILENCE_SECONDS), place)
        after = self._notes(store)
        silent = [rank for rank in after if rank != self.rank and after[rank].beat == before[rank].beat]
        answering = [rank for rank in after if rank not in silent]
        if self.rank == min(answering):
            print(self._words(waited, after, silent), file=sys.stderr, flush=True)
        elif silent:
            # The launcher ends all with the first: let that be the one that tells why.
            self._beat_on(store, 3 * self.period, place)
        if silent:
            os._exit(1)

    def _beat_on(self, store: dist.Store, seconds: float, place: str) -> None:
        """Wait, and answer meanwhile: the others are looking too."""
        for _ in range(math.ceil(seconds / self.period)):
            time.sleep(self.period)
            self._note(store, place)

    def _words(self, waited: float, notes: dict[int, Note], silent: list[int]) -> str:
        mine = notes[self.rank]
        here = f"rank {self.rank} waits at {mine.place}"
        if silent:
            named = "; ".join(f"rank {rank} ({notes[rank]})" for rank in silent[:SHOWN])
            more = f" and {len(silent) - SHOWN} more" if len(silent) > SHOWN else ""
            return (
                f"error: step {mine.step}: no answer from {named}{more}: stopped or dead; {here} for {waited:.0f} s. "
                "Start again to go on from the last checkpoint"
            )
        places: dict[str, list[int]] = {}
        for rank, note in notes.items():
            places.setdefault(f"step {note.step} at {note.place}", []).append(rank)
        rare = sorted(places.items(), key=lambda item: len(item[1]))[:SHOWN]
        named = "; ".join(f"ranks {', '.join(map(str, ranks[:SHOWN]))} in {place}" for place, ranks in rare)
        return f"warning: step {mine.step}: {here} for {waited:.0f} s, and every rank answers: {named}"

    def _notes(self, store: dist.Store) -> dict[int, Note]:
        keys = [f"{PREFIX}/{rank}" for rank in range(self.world)]
        known = [rank for rank, key in enumerate(keys) if store.check([key])]
        return {rank: Note(**json.loads(store.get(keys[rank]))) for rank in known}


def _own_connection() -> dist.Store | None:
    """The ranks' store by a connection of its own: a main thread that waits in it keeps the other one busy."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return None
    # torch's stubs leave it out.
    return store.clone()  # type: ignore[attr-defined]


def _innermost(trace: TracebackType | None) -> FrameType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame if trace else None


def _place(frame: FrameType | None) -> tuple[str, int]:
    """Words for where a thread is, and a number that changes when it moves: the collective, and who called it."""
    collective, caller, line = None, None, frame.f_lineno if frame else 0
    while frame is not None and caller is None:
        path = frame.f_code.co_filename
        if path.endswith("distributed_c10d.py"):
            collective = frame.f_code.co_name
        elif "/torch/" not in path and not path.endswith("typing_extensions.py"):  # its wrapper of deprecated functions
            caller = f"{frame.f_code.co_name} ({Path(path).name}:{frame.f_lineno})"
        frame = frame.f_back
    return (f"{collective} in {caller}" if collective else str(caller)), line
