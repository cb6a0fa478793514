"""Save the checkpoints of a run: every rank writes its shard, and the checkpoint appears when all ranks have written.

A save from top to bottom. Everything is written in the hidden directory SAVE/.iter_N.partial.

1. `training/checkpointing.py` `start_save` collects the sharded state: which slice of which tensor this rank holds, the
   optimizer's by `optimizer_state.py`.
2. `CheckpointSaver.start`, on all ranks: `replicas.py` chooses one rank for each tensor that several ranks hold, and
   `shard_writer.py` plans the files of this rank's shard. Rank 0 writes common.pt, which is the same for all ranks.
3. The shard is written: `background.py` copies it into shared memory, and a process of its own (`writer_process.py`)
   writes it while training continues. Without a background writer `ShardWriter.write_here` writes it at once.
4. `poll` or `wait`, on all ranks: when every rank has written, Megatron-Core calls `_complete`: rank 0 gathers what
   lies where (`checkpoint_index.py`), writes the index, the remaining files and the checksums, renames the directory
   and names it in latest_checkpointed_iteration.txt.

A failure on any rank raises UserError on every rank and removes the hidden directory; the latest checkpoint stays.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

from megatron_moe_lpr.checkpoint.format.directory import finish_iteration, iteration_directory_name
from megatron_moe_lpr.checkpoint.format.retention import remove_hidden
from megatron_moe_lpr.checkpoint.format.writer import TORCH_DIST_CONFIG, save_blob
from megatron_moe_lpr.checkpoint.saving.background import BackgroundWriter
from megatron_moe_lpr.checkpoint.saving.frozen_weights import FrozenWeights
from megatron_moe_lpr.checkpoint.saving.shard_writer import ShardStrategy, ShardWriter, request_writer
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksum_file import write_checksums
from megatron_moe_lpr.files.checksums import ChecksumStream, FileChecksum
from megatron_moe_lpr.liveness import long_work
from megatron_moe_lpr.megatron.overriding import override, overrides_megatron
from megatron_moe_lpr.parallel.every_rank import (
    decide_on_rank_0,
    first_on_any_rank,
    gather_on_rank_0,
    on_every_rank,
    on_rank_0,
)

PARTIAL_SUFFIX = ".partial"


@dataclasses.dataclass(frozen=True)
class Saved:
    """A complete checkpoint."""

    iteration: int
    path: Path
    seconds: float
    """From the call of `start`, or from `began` of that call, to completion."""
    stalled: float
    """Seconds of these in which training waited."""


@dataclasses.dataclass
class _Pending:
    """A save in progress."""

    iteration: int
    partial: Path
    writer: ShardWriter
    add_side_files: Callable[[Path], None]
    started: float
    stalled: float = 0.0


@overrides_megatron
class CallsQueue(AsyncCallsQueue):
    """Megatron's queue of saves under way, all of them with one caller.

    That queue keeps its own caller in an attribute: the object's in 0.16, from 0.17 on one of another name and of
    the class, so that one set on an object would be ignored.
    """

    def __init__(self, caller: BackgroundWriter | None) -> None:
        super().__init__(persistent=True)
        self.caller = caller

    @override
    def _get_async_caller(self) -> BackgroundWriter:
        if self.caller is None:
            raise ValueError("a saver without a background writer has no asynchronous saves")
        return self.caller

    @override
    def schedule_async_request(self, async_request: AsyncRequest) -> int:
        """As Megatron's, and a check that its caller is ours and none of Megatron's own."""
        number = super().schedule_async_request(async_request)
        if self.async_calls[-1].async_caller is not self.caller:
            raise RuntimeError("megatron-core has given the save to a writer of its own")
        return number


class CheckpointSaver:
    """Saves one state at a time. Every rank makes one and calls its methods in the same order."""

    def __init__(
        self,
        root: Path,
        asynchronous: bool,
        on_complete: Callable[[int], None] | None = None,
        frozen: FrozenWeights | None = None,
    ) -> None:
        """Megatron's groups must exist.

        Args:
            root: directory of the iteration directories.
            asynchronous: write from a background process, which is started now.
            on_complete: called on rank 0 with the iteration of each checkpoint that has become the latest.
            frozen: has announced frozen weights in the states to save and gives them their values; None: all tensors
                have their values.
        """
        self.root, self.on_complete = Path(root), on_complete
        self.frozen, self.strategy = frozen, ShardStrategy(frozen)
        self.background = BackgroundWriter() if asynchronous else None
        self.queue = CallsQueue(self.background)
        self.pending: _Pending | None = None
        self.validated = False

    def expect(self, state: ShardedStateDict, metadata: dict[str, Any]) -> None:
        """Prepare for saves of states like this one: plan the files and read the frozen weights.

        With a background writer, also reserve the memory of a save while training continues, so that the first save
        takes no longer than later ones.

        Raises:
            UserError: on every rank: a frozen weight cannot be read.
            ValueError: on rank 0: the ranks' slices do not make up whole tensors; the other ranks raise a UserError.
        """
        if self.background is None and self.frozen is None:
            return
        sharded, _ = self._split(state, metadata)
        writer = request_writer(self.strategy.async_save(sharded, self.root))
        on_every_rank(writer.raise_error)
        if self.background:
            self.background.expect(writer)

    def _split(self, state: ShardedStateDict, metadata: dict[str, Any]) -> tuple[ShardedStateDict, dict[str, Any]]:
        """Split a state into its sharded tensors and what is the same on all ranks.

        The first call also compares the latter with rank 0's. That the ranks' slices make up whole tensors is checked
        with the index (`checkpoint_index.py`).
        """
        sharded, common = save_preprocess(state | {"content_metadata": metadata}, validate_access_integrity=False)
        if not self.validated:
            validate_sharding_integrity([], common)  # warns of differences
        self.validated = True
        return sharded, common

    def start(
        self,
        iteration: int,
        state: ShardedStateDict,
        metadata: dict[str, Any],
        add_side_files: Callable[[Path], None],
        began: float | None = None,
    ) -> Saved | None:
        """Begin to save, after completing the save before; without a background writer, save.

        The state may change as soon as this returns.

        Args:
            state: as Megatron's dist_checkpointing.save takes it.
            metadata: the checkpoint's `content_metadata`, which says how its keys are formed.
            add_side_files: writes the files beside the tensors into a given directory; called on rank 0.
            began: time.monotonic() when the caller began to prepare the save; by default now.

        Returns:
            The checkpoint, if it is complete already.

        Raises:
            UserError: on every rank, with the reason: it cannot be written. The latest checkpoint stays as it was.
        """
        started = time.monotonic() if began is None else began
        self.wait()
        with long_work(f"saving step {iteration:,} to {self.root}"):
            partial = self._partial_directory(iteration)
            self._on_rank_0(iteration, lambda: _make_empty(partial))
            sharded, common = self._split(state, metadata)
            # Which rank writes which tensors, and into which files. Nothing is written yet.
            request = self.strategy.async_save(sharded, partial)
            pending = self.pending = _Pending(iteration, partial, request_writer(request), add_side_files, started)
            # Megatron-Core calls it on every rank when all have written.
            request.add_finalize_fn(lambda: self._complete(pending))
            if dist.get_rank() == 0:
                _write_common(common, pending)
            if self.background is None:
                return self._finalize(pending, request.execute_sync)
            self.queue.schedule_async_request(request)  # calls BackgroundWriter.schedule_async_call
            pending.stalled = time.monotonic() - started
            return None

    def poll(self) -> Saved | None:
        """Complete the save in progress if all ranks have written. Costs nothing without a save in progress.

        Raises:
            UserError: on every rank: a rank could not write.
        """
        if self.pending is None:
            return None
        return self._finalize(self.pending, self.queue.maybe_finalize_async_calls)

    def wait(self) -> Saved | None:
        """Wait for the writers of all ranks and complete the save in progress.

        Raises:
            UserError: on every rank: a rank could not write.
        """
        if self.pending is None:
            return None
        return self._finalize(self.pending, lambda: self.queue.maybe_finalize_async_calls(blocking=True))

    def close(self) -> None:
        """End the background writer; a save in progress is abandoned and its files are removed."""
        if self.background:
            self.background.close(abort=self.pending is not None)
            self.background = None
        if self.pending and dist.get_rank() == 0:
            shutil.rmtree(self.pending.partial, ignore_errors=True)
        self.pending = None

    def _finalize(self, pending: _Pending, action: Callable[[], object]) -> Saved | None:
        """Let Megatron-Core complete the save by `action`, if all ranks have written; None: they have not."""
        begin = time.monotonic()
        with long_work(f"saving step {pending.iteration:,} to {self.root}"):
            action()
        if self.pending is not None:  # `_complete` was not called
            pending.stalled += time.monotonic() - begin
            return None
        now = time.monotonic()
        stalled = pending.stalled + now - begin if self.background else now - pending.started
        path = self.root / iteration_directory_name(pending.iteration)
        return Saved(pending.iteration, path, now - pending.started, stalled)

    def _complete(self, pending: _Pending) -> None:
        """Make the directory a checkpoint: every rank has written its shard, or has failed."""
        if reasons := _failures(pending.writer):
            self._abandon(reasons, pending.iteration)
        self.strategy.index.complete(pending.writer.results)
        written = gather_on_rank_0(pending.writer.written)

        def complete() -> None:
            entries = {name: entry for part in written or () for name, entry in part.items()}
            entries |= self.strategy.index.write(pending.partial)
            entries["metadata.json"] = _write_format(pending.partial)
            pending.add_side_files(pending.partial)
            write_checksums(pending.partial, entries)
            finish_iteration(pending.partial, self.root, pending.iteration)
            if self.on_complete:
                self.on_complete(pending.iteration)

        self._on_rank_0(pending.iteration, complete)
        self.pending = None

    def _on_rank_0(self, iteration: int, action: Callable[[], object]) -> None:
        """Run `action` on rank 0; if it fails, abandon the save on every rank."""
        try:
            on_rank_0(action)
        except UserError as error:
            self._abandon(str(error), iteration)

    def _abandon(self, reason: str, iteration: int) -> NoReturn:
        if dist.get_rank() == 0:
            shutil.rmtree(self._partial_directory(iteration), ignore_errors=True)
        self.pending = None
        raise UserError(f"--save {self.root}: checkpoint of step {iteration} was not written: {reason}")

    def _partial_directory(self, iteration: int) -> Path:
        return self.root / f".{iteration_directory_name(iteration)}{PARTIAL_SUFFIX}"


def remove_partial(root: Path) -> None:
    """Remove what a run left in `root` that was killed during a save or removal. Only its owner may call it."""
    remove_hidden(root)
    for path in Path(root).glob(f".iter_*{PARTIAL_SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)


def _write_common(common: dict[str, Any], pending: _Pending) -> None:
    """Write what is the same on all ranks, like Megatron's TorchCommonSaveStrategy.

    An error is kept in the writer, which reports it to all ranks at the end of the save.
    """
    try:
        with ChecksumStream(open(pending.partial / "common.pt", "wb")) as stream:
            save_blob(common, stream)
        pending.writer.written["common.pt"] = stream.entry()
    except (OSError, RuntimeError) as error:
        pending.writer.error = error


def _write_format(directory: Path) -> FileChecksum:
    """Write metadata.json as Megatron's `save_config` does: with this file the directory is a checkpoint."""
    with ChecksumStream(open(directory / "metadata.json", "wb")) as stream:
        stream.write(json.dumps(TORCH_DIST_CONFIG).encode())
    return stream.entry()


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _failures(writer: ShardWriter) -> str | None:
    """The reasons of all ranks that could not write, the same on every rank; None: all have written."""
    reason = None if writer.error is None else _reason(writer.error)
    if first_on_any_rank(reason) is None:
        return None
    return decide_on_rank_0(reason, lambda reasons: "; ".join(sorted({found for found in reasons if found})))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return str(error) or type(error).__name__
