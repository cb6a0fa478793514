"""Ends a process that hangs, with a message that says what hangs, for how long and where, or which rank is dead.

A thread of each process checks every few seconds whether the main thread has made progress (`liveness`), and writes a
note to the store of torch.distributed: that the process is alive and where its main thread is. A training step does
nothing for this. A rank that has made no progress for most of the timeout reads all notes: a rank whose note does not
change is stopped or dead. When no rank has made progress for nine tenths of the timeout, every rank ends with one line.
Timeouts of collectives are not enough: a main thread that waits for a disk is in none, and NCCL's own timeout would end
the process without an exception in Python.
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
    silent_ranks_line,
    slow_line,
)
from megatron_moe_lpr.training.watchdog.main_thread import MainThread, describe_frame, innermost
from megatron_moe_lpr.training.watchdog.outside_watch import OutsideWatch

PATIENCE = 0.75
"""Part of the timeout after which a rank without progress reads the notes of all ranks."""
LIMIT = 0.9
"""Part of the timeout after which ranks without progress end. Below 1, so that the rank that hangs reports it before
the collectives of the ranks that wait for it fail."""
BEATS_A_TIMEOUT = 60
LONGEST_PERIOD = 10.0
SILENCE_SECONDS = 10.0
"""A rank whose note does not change for so long (and for three periods) counts as dead; busy machines are slow."""
SILENT_PART_OF_LONG_WORK = 0.5
"""Part of the timeout that a rank in long work may be silent: libraries may hold Python's lock for minutes."""
RELEASE_SECONDS = 5.0


class Heartbeat:
    """Watches the thread that enters the `with` block. Process groups may be made before it or inside it."""

    def __init__(self, timeout: float, before_end: Callable[[], object] | None = None) -> None:
        """Prepare to watch.

        Args:
            timeout: seconds after which a collective fails, and the longest time without progress.
            before_end: called before this process ends because of a hang, for example to release a lock; may hang too.
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
        """Raise UserError where a collective of the block has failed because another rank ended or took too long."""
        self.ended.set()
        if self.thread:
            self.thread.join(self.period)
        if self.outside:
            self.outside.close()
        if is_collective_failure(error):
            place, _ = describe_frame(innermost(trace))
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"step {self.step}: rank {self.rank} lost another rank at {place} ({reason}); what the rank says that "
                "ended first is the cause"
            ) from error

    @property
    def rank(self) -> int:
        """Global rank of this process, also before there are process groups."""
        return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))

    def _beat_until_end(self) -> None:
        next_check = PATIENCE * self.timeout
        while not self.ended.wait(self.period):
            # Counted in beats, not by the clock: a job that is suspended as a whole has not waited.
            self._sample()
            next_check = next_check if self.still else PATIENCE * self.timeout
            try:
                self._connect()
                self._write_note()
                if self.board and self._waited() >= next_check:
                    self._check_ranks(self.board)
                    # Check again later where another rank is in long work: it may die meanwhile.
                    next_check = self._waited() + PATIENCE * self.timeout
                if self._waited() >= LIMIT * self.timeout and not self._another_rank_progresses():
                    self._end()
            except (dist.DistError, RuntimeError):
                # The store is gone with the rank or launcher that kept it: the run is ending, and so must this rank.
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

    def _write_note(self) -> None:
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

    def _check_ranks(self, board: NoteBoard) -> None:
        """End this process where another rank is dead; otherwise warn with the places of all ranks."""
        before = board.read()
        self._keep_beating(max(3 * self.period, SILENCE_SECONDS))
        silent = self._silent(before, board.read())
        if any(before[rank].in_long_work for rank in silent):
            self._keep_beating(SILENT_PART_OF_LONG_WORK * self.timeout)
            silent = self._silent(before, board.read())
        notes = board.read()
        answering = [rank for rank in notes if rank not in silent]
        if self.rank == min(answering):
            line = silent_ranks_line(self.rank, notes, silent) if silent else slow_line(self.rank, notes)
            _print(line)
        elif silent:
            # The launcher ends all ranks with the first that ends: let that be the one that prints the reason.
            self._keep_beating(3 * self.period)
        if silent:
            self._leave()

    def _silent(self, before: dict[int, Note], after: dict[int, Note]) -> list[int]:
        return [rank for rank in before if rank != self.rank and after[rank].beat == before[rank].beat]

    def _another_rank_progresses(self) -> bool:
        """Whether another rank has made progress within the limit: then this rank only waits for it."""
        if self.board is None:
            return False
        others = [note for rank, note in self.board.read().items() if rank != self.rank]
        return any(note.still < LIMIT * self.timeout - self.period for note in others)

    def _keep_beating(self, seconds: float) -> None:
        """Wait, and keep writing notes: the other ranks read them at the same time."""
        for _ in range(math.ceil(seconds / self.period)):
            time.sleep(self.period)
            self._sample()
            self._write_note()

    def _end(self) -> None:
        """End this process, since no rank has made progress for too long."""
        notes = self.board.read() if self.board else {}
        notes[self.rank] = self._own_note()
        culprits = [rank for rank, note in notes.items() if not note.waits_for_peers]
        if culprits and self.rank not in culprits:
            # The launcher ends all ranks with the first that ends: let a rank that hangs print its message first.
            with contextlib.suppress(dist.DistError, RuntimeError):
                self._keep_beating(3 * self.period)
        _print(hang_line(self.rank, notes, culprits, self.timeout))
        if self.rank in culprits or not culprits:
            print_stacks(self.main.frame())
        self._leave()

    def _leave(self) -> None:
        if self.before_end:
            # In a thread of its own: it writes to a file system, which may be what hangs.
            thread = start_thread(self.before_end, "the release of the run's lock")
            if thread:
                thread.join(RELEASE_SECONDS)
        os._exit(1)


def _print(line: str) -> None:
    """Print on standard error, also where nobody reads it any more."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return
