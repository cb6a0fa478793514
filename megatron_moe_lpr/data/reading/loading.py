"""Loader processes that read micro-batches ahead; if they fail, the calling process reads the rest."""

import atexit
import contextlib
import errno
import faulthandler
import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from megatron_moe_lpr.liveness import waiting_for
from megatron_moe_lpr.processes import STOP_SIGNALS, end_with_parent, shielded_from

Batch = dict[str, torch.Tensor]

STACK_SIGNAL = signal.SIGUSR2
"""Signal on which a loader process prints its stack."""
DEATH_SECONDS = 1.0
"""Seconds to wait for a killed loader process to end."""
SHARED_MEMORY = (
    "the shared memory is full: with docker give --shm-size 8g or --ipc host, or pass --num-workers 0 (df -h /dev/shm)"
)
LIMITS = "no more processes or threads: raise `ulimit -u`, or pass --num-workers 0"


# Otherwise `__del__` of an iterator whose constructor failed prints an AttributeError.
_MultiProcessingDataLoaderIter._shutdown = True


class BatchIterator(Iterator[Batch]):
    """Yields batches of given samples, in order.

    Loader processes only save time. If they cannot be started, are killed or lack shared memory, a warning on standard
    error says why, and the calling process reads all further batches.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: Sequence[list[int]],
        collate: Callable[[Sequence[Batch]], Batch],
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Start the loader processes.

        Args:
            dataset: yields dicts of tensors [sequence].
            indices: sample indices of each batch.
            collate: stacks samples to a batch.
            num_workers: loader processes; 0: read in the calling process.
            pin_memory: put batches into page-locked memory, for copies to a GPU.
        """
        self.dataset, self.indices, self.collate = dataset, indices, collate
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.delivered = 0
        self.workers: set[BaseProcess] = set()
        try:
            self.iterator = self._start()
        except (OSError, RuntimeError) as error:
            if not num_workers:
                raise
            self._go_on_without_workers(error)

    def __next__(self) -> Batch:
        """Return the next batch. Raises whatever reading it raises."""
        how = f"its {self.num_workers} loader processes (--num-workers)" if self.num_workers else "this process"
        with waiting_for(f"reading a batch of {type(self.dataset).__name__} in {how}"):
            try:
                batch = next(self.iterator)
            except StopIteration:
                raise
            except Exception as error:
                if not self.num_workers:
                    raise
                # Errors of the data itself are raised again here, unchanged.
                self._go_on_without_workers(error)
                batch = next(self.iterator)
        self.delivered += 1
        return batch

    def _start(self) -> Iterator[Batch]:
        """Loader processes don't hear what a batch system tells every process: the rank needs them for its last
        step."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.indices[self.delivered :],
            collate_fn=functools.partial(_in_shared_memory, self.collate),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # Forked loaders share the memory-mapped indexes; any other start would copy them into each.
            multiprocessing_context="fork" if self.num_workers else None,
            worker_init_fn=_start_worker if self.num_workers else None,
        )
        others, on_death = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
        try:
            with shielded_from(STOP_SIGNALS):
                return iter(loader)
        finally:
            self.workers = set(multiprocessing.active_children()) - others
            # At exit Python sends SIGTERM to remaining workers and joins them; they ignore it, so it would hang.
            atexit.register(_kill, self.workers)
            # torch's SIGCHLD handler would raise at an arbitrary point of this process when a loader process dies.
            with contextlib.suppress(ValueError):  # not the main thread: torch has set no handler
                signal.signal(signal.SIGCHLD, on_death or signal.SIG_DFL)

    def _go_on_without_workers(self, error: Exception) -> None:
        ends = _exit_codes(self.workers)
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(
            f"warning: {rank}batches are read in the training process from now on, which is slower: "
            f"{explain_failure(error, ends)}",
            file=sys.stderr,
            flush=True,
        )
        _kill(self.workers)
        self.num_workers, self.workers = 0, set()
        self.iterator = self._start()


def _exit_codes(workers: set[BaseProcess]) -> list[int]:
    """Return exit codes of failed loader processes, waiting for those that are still ending."""
    deadline = time.monotonic() + DEATH_SECONDS
    while not (codes := [worker.exitcode for worker in workers if worker.exitcode]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return codes


def explain_failure(error: Exception, exit_codes: Sequence[int]) -> str:
    """Return why loader processes failed and what to do about it.

    Args:
        exit_codes: exit codes of ended loader processes; negative: killed by that signal.
    """
    reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    if -signal.SIGKILL in exit_codes:
        return f"a loader process was killed, perhaps for lack of memory: pass a smaller --num-workers ({reason})"
    if -signal.SIGBUS in exit_codes:
        return f"a loader process died of a bus error: a data file cannot be read, or {SHARED_MEMORY}"
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOSPC or os.strerror(errno.ENOSPC) in reason or "shared memory" in reason:
        return f"{SHARED_MEMORY} ({reason})"
    if number == errno.EAGAIN or "new thread" in reason:
        return f"{LIMITS} ({reason})"
    return f"a loader process ended with exit code {exit_codes[0]} ({reason})" if exit_codes else reason


def _in_shared_memory(collate: Callable[[Sequence[Batch]], Batch], samples: Sequence[Batch]) -> Batch:
    """Collate, and move the batch to shared memory inside the loader process, where an error is reported.

    torch would do so in a queue's thread, where an error is dropped and the rank waits for ever."""
    batch = collate(samples)
    if get_worker_info() is not None:
        for tensor in batch.values():
            tensor.share_memory_()
    return batch


def _kill(workers: set[BaseProcess]) -> None:
    # torch's SIGCHLD handler would raise for each, in the middle of Python's shutdown.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        with contextlib.suppress(ValueError):  # closed already
            worker.kill()


def _start_worker(number: int) -> None:
    end_with_parent()
    with contextlib.suppress(AttributeError, OSError, ValueError, RuntimeError):  # no such signal, or no such stream
        faulthandler.register(STACK_SIGNAL, all_threads=True)
