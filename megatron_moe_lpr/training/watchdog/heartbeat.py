"""Ends a process that hangs, and says what hangs, for how long and where; names ranks that do not answer.

A thread of each process looks every few seconds at whether the main thread has made progress (`liveness`), and notes
in the store that the ranks met in that it lives and where the main thread is. The step itself does nothing for it. A
rank that has made no progress for most of the timeout reads the notes of all: a rank whose notes stand still is stopped
or dead. When no rank has made progress for nine tenths of the timeout, every rank ends with one line. That holds for
gloo, NCCL and a single process alike: a main thread that waits for a disk hears of no exception, and with NCCL a
collective's own timeout would end the process without Python hearing of it.
"""

import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

from megatron_moe_lpr import liveness
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform.collectives import is_collective_failure
from megatron_moe_lpr.processes import start_thread
from megatron_moe_lpr.training.watchdog.hang_report import (
    Note,
    NoteBoard,
    hang_line,
    print_stacks,
    silence_line,
    slow_line,
)
from megatron_moe_lpr.training.watchdog.main_thread import MainThread, innermost, place_of
from megatron_moe_lpr.training.watchdog.outside_watch import OutsideWatch

PATIENCE = 0.75
"""Share of the timeout after which a rank asks what it waits for."""
LIMIT = 0.9
"""Share of the timeout after which ranks end. Below 1: a rank that hangs shall say so before the collectives of those
that wait for it fail, and ask only for other ranks."""
BEATS_A_TIMEOUT = 60
LONGEST_PERIOD = 10.0
SILENCE_SECONDS = 10.0
"""A rank without a beat for so long (and three periods) does not answer: a busy machine takes its time."""
SILENT_SHARE_OF_LONG_WORK = 0.5
"""Share of the timeout for a rank in long work: libraries may hold Python's lock for minutes."""
RELEASE_SECONDS = 5.0


class Heartbeat:
    """Watches the thread that enters its `with` block. Process groups may be made before it or inside it."""

    def __init__(self, timeout: float, before_end: Callable[[], object] | None = None) -> None:
        """Prepare to watch.

        Args:
            timeout: seconds after which a collective fails, and the longest time without progress.
            before_end: called before this process ends for a hang, to release a lock for example; it may hang too.
        """
        self.step, self.beats, self.still = 0, 0, 0
        self.timeout, self.period = timeout, min(LONGEST_PERIOD, timeout / BEATS_A_TIMEOUT)
        self.before_end = before_end
        self.main = MainThread()
        self.ended = threading.Event()
        self.board: NoteBoard | None = None
        self.thread: threading.Thread | None = None
        self.outside: OutsideWatch | None = None

    def __enter__(self) -> "Heartbeat":
        self.outside = OutsideWatch(self.timeout, self.period, self.rank)
        self.thread = start_thread(self._beat_until_end, "the watch for ranks that hang (the run has none)")
        if self.thread is None:
            self.outside.close()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Raises UserError where a collective of the block has failed: a peer ended or took too long."""
        self.ended.set()
        if self.thread:
            self.thread.join(self.period)
        if self.outside:
            self.outside.close()
        if is_collective_failure(error):
            place, _ = place_of(innermost(trace))
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"step {self.step}: rank {self.rank} lost another rank at {place} ({reason}); what the rank says that "
                "ended first is the cause"
            ) from error

    @property
    def rank(self) -> int:
        """Of this process, also before there are process groups."""
        return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))

    def _beat_until_end(self) -> None:
        next_look = PATIENCE * self.timeout
        while not self.ended.wait(self.period):
            # Counted in beats, not by the clock: a job that is suspended as a whole has not waited.
            self._sample()
            next_look = next_look if self.still else PATIENCE * self.timeout
            try:
                self._connect()
                self._note()
                if self.board and self._waited() >= next_look:
                    self._look(self.board)
                    # Again where another rank works for long: it may die meanwhile.
                    next_look = self._waited() + PATIENCE * self.timeout
                if self._waited() >= LIMIT * self.timeout and not self._another_works():
                    self._end()
            except (dist.DistError, RuntimeError):
                # The store went with the rank or launcher that kept it: they are ending. This rank must too.
                self.board = None

    def _sample(self) -> None:
        if self.outside:
            self.outside.beat()
        self.still = 0 if self.main.has_advanced(self.period) else self.still + 1

    def _waited(self) -> float:
        """Seconds without progress."""
        return self.still * self.period

    def _connect(self) -> None:
        if self.board is None and self.beats == 0 and dist.is_initialized() and dist.get_world_size() > 1:
            self.board = NoteBoard.connect(dist.get_world_size())

    def _note(self) -> None:
        if self.board is None:
            return
        self.beats += 1
        self.board.write(self.rank, self._own_note())

    def _own_note(self) -> Note:
        place, is_collective = self.main.place()
        wait = liveness.current_wait()
        return Note(
            beat=self.beats,
            step=self.step,
            place=place,
            host=socket.gethostname(),
            process=os.getpid(),
            still=self._waited(),
            waits_for_peers=is_collective or (wait is not None and wait.on_peers),
            doing=wait.description if wait and not wait.on_peers else None,
            in_long_work=liveness.in_long_work(),
        )

    def _look(self, board: NoteBoard) -> None:
        """End this process where another rank does not answer; else say where all are."""
        before = board.read()
        self._beat_on(max(3 * self.period, SILENCE_SECONDS))
        silent = self._silent(before, board.read())
        if any(before[rank].in_long_work for rank in silent):
            self._beat_on(SILENT_SHARE_OF_LONG_WORK * self.timeout)
            silent = self._silent(before, board.read())
        notes = board.read()
        answering = [rank for rank in notes if rank not in silent]
        if self.rank == min(answering):
            line = silence_line(self.rank, notes, silent) if silent else slow_line(self.rank, notes)
            _print(line)
        elif silent:
            # The launcher ends all with the first: let that be the one that tells why.
            self._beat_on(3 * self.period)
        if silent:
            self._leave()

    def _silent(self, before: dict[int, Note], after: dict[int, Note]) -> list[int]:
        return [rank for rank in before if rank != self.rank and after[rank].beat == before[rank].beat]

    def _another_works(self) -> bool:
        """Whether a rank has made progress meanwhile: this one waits for it, or ends when it has come here too."""
        if self.board is None:
            return False
        others = [note for rank, note in self.board.read().items() if rank != self.rank]
        return any(note.still < LIMIT * self.timeout - self.period for note in others)

    def _beat_on(self, seconds: float) -> None:
        """Wait, and note on meanwhile: the others are reading too."""
        for _ in range(math.ceil(seconds / self.period)):
            time.sleep(self.period)
            self._sample()
            self._note()

    def _end(self) -> None:
        """End this process: nothing has made progress for too long."""
        notes = self.board.read() if self.board else {}
        notes[self.rank] = self._own_note()
        culprits = [rank for rank, note in notes.items() if not note.waits_for_peers]
        if culprits and self.rank not in culprits:
            # The launcher ends all with the first: let those be heard that know what hangs.
            with contextlib.suppress(dist.DistError, RuntimeError):
                self._beat_on(3 * self.period)
        _print(hang_line(self.rank, notes, culprits, self.timeout))
        if self.rank in culprits or not culprits:
            print_stacks(self.main.frame())
        self._leave()

    def _leave(self) -> None:
        if self.before_end:
            # In a thread of its own: it writes to the file system that may be what hangs.
            thread = start_thread(self.before_end, "the release of the run's lock")
            if thread:
                thread.join(RELEASE_SECONDS)
        os._exit(1)


def _print(line: str) -> None:
    """Also where nobody reads standard error any more."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return
