"""Ends a process that hangs, with a message that says what hangs, for how long and where, or which rank is dead.

A thread of each process checks every few seconds whether the main thread has made progress (`liveness`), and writes a
note to the store of torch.distributed: that the process is alive and where its main thread is. A training step does
nothing for this. When ranks have made no progress for most of the timeout, one of them reads all notes and says what it
finds (`examination.py`): a rank whose note does not change is stopped or dead. When no rank has made progress for nine
tenths of the timeout, every rank ends with one line.
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
from megatron_moe_lpr.training.watchdog.examination import LIMIT, Examination, Findings
from megatron_moe_lpr.training.watchdog.hang_report import (
    SHOWN,
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
"""Part of the timeout after which a rank without progress wants to know what the notes of all ranks say."""
BEATS_A_TIMEOUT = 60
LONGEST_PERIOD = 10.0
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
        self.examination: Examination | None = None
        self.next_warning = PATIENCE * timeout
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
        while not self.ended.wait(self.period):
            # Counted in beats, not by the clock: a job that is suspended as a whole has not waited.
            self._sample()
            try:
                self._connect()
                self._write_note()
                if self.examination is None:
                    if self._waited() >= LIMIT * self.timeout:
                        self._end()
                elif self._waited() >= PATIENCE * self.timeout:
                    self._act(self.examination, self.examination.beat())
                elif self.examination.text is not None:
                    self.examination.rest()
            except (dist.DistError, RuntimeError):
                # The store is gone with the rank or launcher that kept it: the run is ending, and so must this rank.
                self.board = self.examination = None

    def _sample(self) -> None:
        if self.outside:
            self.outside.beat()
        self.still = 0 if self.main.has_advanced(self.period) else self.still + 1
        if not self.still:
            self.next_warning = PATIENCE * self.timeout

    def _waited(self) -> float:
        """Seconds without progress."""
        return self.still * self.period

    def _connect(self) -> None:
        if self.board is None and self.beats == 0 and dist.is_initialized() and dist.get_world_size() > 1:
            self.board = NoteBoard.connect(dist.get_world_size())
            if self.board:
                self.examination = Examination(self.board, self.rank, self.period, self.timeout)

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

    def _act(self, examination: Examination, found: Findings | None) -> None:
        """End this process where another rank is dead or none makes progress; else warn once where the ranks are."""
        if found is None:
            return
        if found.silent:
            # The launcher ends all ranks with the first that ends: let that be the one that prints the reason.
            if found.examiner != self.rank:
                self._keep_beating(3 * self.period)
            else:
                _print(silent_ranks_line(self.rank, examination.notes, examination.silent()))
            self._leave()
        if self._waited() >= LIMIT * self.timeout and not found.progresses:
            self._end(found)
        if found.examiner == self.rank and examination.examined >= examination.silence and self._is_to_warn():
            _print(slow_line(self.rank, examination.notes))

    def _is_to_warn(self) -> bool:
        """Whether a warning is due, the next one as much later."""
        due = self._waited() >= self.next_warning
        if due:
            self.next_warning = self._waited() + PATIENCE * self.timeout
        return due

    def _keep_beating(self, seconds: float) -> None:
        """Wait, and keep writing notes: the other ranks read them at the same time."""
        for _ in range(math.ceil(seconds / self.period)):
            time.sleep(self.period)
            self._sample()
            self._write_note()

    def _end(self, found: Findings | None = None) -> None:
        """End this process, since no rank has made progress for too long.

        The launcher ends all ranks with the first that ends: every rank that has something to say says it at once, and
        a rank that only waits for others leaves last. Of many ranks only a few speak.
        """
        mine, culprits = self._own_note(), found.culprits if found else {}
        hangs = not mine.waits_for_peers
        speaks = found is None or self.rank in (*culprits, found.examiner) or self.rank < SHOWN
        if speaks:
            _print(hang_line(self.rank, mine, {self.rank: mine} if hangs else culprits, self.timeout))
            if hangs or not culprits:
                print_stacks(self.main.frame())
        if found:
            with contextlib.suppress(dist.DistError, RuntimeError):
                self._keep_beating((2 if hangs else 4) * self.period)
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
