"""Checkpoints of a run: shared among all ranks, written beside training, in place only when complete on every rank."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint import CheckpointException

from megatron_moe_lpr.checkpoint.format.directory import finish_iteration, iteration_directory_name
from megatron_moe_lpr.checkpoint.format.retention import remove_hidden
from megatron_moe_lpr.checkpoint.format.writer import TORCH_DIST_CONFIG, save_blob
from megatron_moe_lpr.checkpoint.saving.background import BackgroundWriter
from megatron_moe_lpr.checkpoint.saving.frozen_weights import FrozenWeights
from megatron_moe_lpr.checkpoint.saving.share_writer import ShareStrategy, ShareWriter, writer_of
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import ChecksumStream, FileChecksum, write_manifest
from megatron_moe_lpr.liveness import long_work
from megatron_moe_lpr.megatron.overriding import override, overrides_megatron

PARTIAL_SUFFIX = ".partial"


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    iteration: int
    path: Path
    seconds: float
    """From the call of `start` on, or from when its caller began to wait."""
    stalled: float
    """Seconds of these in which the caller could not go on."""


@dataclasses.dataclass
class _Pending:
    iteration: int
    partial: Path
    writer: ShareWriter
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
            asynchronous: write from a process beside this one, started now.
            on_complete: called on rank 0 with each iteration whose checkpoint has become the latest.
            frozen: what announces weights in the states that are saved; None: all have their values.
        """
        self.root, self.on_complete = Path(root), on_complete
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.frozen = frozen
        self.strategy = FullyParallelSaveStrategyWrapper(ShareStrategy(frozen), group, do_cache_distribution=True)
        self.background = BackgroundWriter() if asynchronous else None
        self.queue = CallsQueue(self.background)
        self.pending: _Pending | None = None
        self.validated = False

    def expect(self, state: ShardedStateDict, metadata: dict[str, Any]) -> None:
        """Plan for states like this one and read the frozen weights that `frozen` announces. With a background writer,
        take the memory that a save needs, beside training: the first save then takes no longer than later ones.

        Raises:
            UserError: on every rank: a frozen weight cannot be read.
        """
        if self.background is None and self.frozen is None:
            return
        writer = writer_of(self.strategy.async_save(self._checked(state, metadata)[0], self.root))
        if self.frozen:
            _raise_first(writer.error)
        if self.background:
            self.background.expect(writer)

    def _checked(self, state: ShardedStateDict, metadata: dict[str, Any]) -> tuple[ShardedStateDict, dict[str, Any]]:
        """Sharded and common part of a state; that all ranks' parts fit together is looked at once."""
        parts = save_preprocess(state | {"content_metadata": metadata}, not self.validated)
        self.validated = True
        return parts

    def start(
        self,
        iteration: int,
        state: ShardedStateDict,
        metadata: dict[str, Any],
        add_side_files: Callable[[Path], None],
        began: float | None = None,
    ) -> Saved | None:
        """Begin to save; without a background writer, save. The state may change as soon as this returns.

        Waits for the save before it, whose result `wait` gives to who asks in time.

        Args:
            state: as Megatron's dist_checkpointing.save takes it.
            metadata: what the checkpoint's content is (its `content_metadata`).
            add_side_files: writes the files beside the tensors into the directory it is given, on rank 0.
            began: time.monotonic() when the caller began to wait, to gather `state` for one; by default now.

        Returns:
            The checkpoint, where it is complete already.

        Raises:
            UserError: it can't be written, on every rank with the reason; the latest checkpoint stays as it was.
        """
        started = time.monotonic() if began is None else began
        self.wait()
        with long_work(f"saving step {iteration:,} to {self.root}"):
            return self._start(iteration, state, metadata, add_side_files, started)

    def _start(
        self,
        iteration: int,
        state: ShardedStateDict,
        metadata: dict[str, Any],
        add_side_files: Callable[[Path], None],
        started: float,
    ) -> Saved | None:
        partial = self.root / f".{iteration_directory_name(iteration)}{PARTIAL_SUFFIX}"
        self._together(iteration, lambda: _make_empty(partial))
        sharded, common = self._checked(state, metadata)
        request = self.strategy.async_save(sharded, partial)
        pending = _Pending(iteration, partial, writer_of(request), add_side_files, started)
        request.add_finalize_fn(lambda: self._finish(pending))
        self.pending = pending
        if dist.get_rank() == 0:
            _write_common(common, pending)
        if self.background:
            self.queue.schedule_async_request(request)
            pending.stalled = time.monotonic() - started
            return None
        return self._finalize(pending, request.execute_sync)

    def poll(self) -> Saved | None:
        """Complete the save under way if all ranks have written. Cheap where there is none.

        Raises:
            UserError: on every rank: a rank could not write.
        """
        if self.pending is None:
            return None
        return self._finalize(self.pending, self.queue.maybe_finalize_async_calls)

    def wait(self) -> Saved | None:
        """Complete the save under way, waiting for the writers. Raises what `poll` raises."""
        if self.pending is None:
            return None
        return self._finalize(self.pending, lambda: self.queue.maybe_finalize_async_calls(blocking=True))

    def close(self) -> None:
        """End the background writer; a save still under way is given up, and leaves nothing behind."""
        if self.background:
            self.background.close(abort=self.pending is not None)
            self.background = None
        if self.pending and dist.get_rank() == 0:
            shutil.rmtree(self.pending.partial, ignore_errors=True)
        self.pending = None

    def _finalize(self, pending: _Pending, action: Callable[[], object]) -> Saved | None:
        """Let Megatron finalize; `_finish` clears `pending` where it gets as far."""
        begin = time.monotonic()
        try:
            with long_work(f"saving step {pending.iteration:,} to {self.root}"):
                action()
        except CheckpointException as error:
            # It derives from BaseException, and only rank 0 knows the reasons.
            reasons = [_reason(failure[0]) for failure in error.failures.values()]
            self._give_up(_from_rank_0("; ".join(sorted(set(reasons)))), pending.iteration)
        if self.pending is not None:
            pending.stalled += time.monotonic() - begin
            return None
        now = time.monotonic()
        stalled = pending.stalled + now - begin if self.background else now - pending.started
        path = self.root / iteration_directory_name(pending.iteration)
        return Saved(pending.iteration, path, now - pending.started, stalled)

    def _finish(self, pending: _Pending) -> None:
        """After every rank has written its share and rank 0 the index of all: name the directory."""
        written = _gathered(pending.writer.written)

        def finish() -> None:
            pending.writer.raise_index_error()
            _write_format(pending)
            pending.add_side_files(pending.partial)
            entries = {name: entry for part in (*written, pending.writer.written) for name, entry in part.items()}
            write_manifest(pending.partial, entries)
            finish_iteration(pending.partial, self.root, pending.iteration)
            if self.on_complete:
                self.on_complete(pending.iteration)

        self._together(pending.iteration, finish)
        self.pending = None

    def _together(self, iteration: int, action: Callable[[], object]) -> None:
        """Run `action` on rank 0; where it fails, fail on every rank."""
        reason = None
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                reason = _reason(error)
            except UserError as error:
                reason = str(error)
        reason = _from_rank_0(reason)
        if reason:
            self._give_up(reason, iteration)

    def _give_up(self, reason: str, iteration: int) -> None:
        if dist.get_rank() == 0:
            partial = self.root / f".{iteration_directory_name(iteration)}{PARTIAL_SUFFIX}"
            shutil.rmtree(partial, ignore_errors=True)
        self.pending = None
        raise UserError(f"--save {self.root}: checkpoint of step {iteration} was not written: {reason}")


def remove_partial(root: Path) -> None:
    """Remove what a run that was killed while it saved or removed has left in `root`. Only for who owns it."""
    remove_hidden(root)
    for path in Path(root).glob(f".iter_*{PARTIAL_SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)


def _write_common(common: dict[str, Any], pending: _Pending) -> None:
    """What is the same on all ranks, as Megatron's TorchCommonSaveStrategy writes it."""
    try:
        with ChecksumStream(open(pending.partial / "common.pt", "wb")) as stream:
            save_blob(common, stream)
        pending.writer.written["common.pt"] = stream.entry()
    except (OSError, RuntimeError) as error:
        pending.writer.error = error


def _write_format(pending: _Pending) -> None:
    """What Megatron's `save_config` writes, last of all files: with it the directory is a checkpoint."""
    with ChecksumStream(open(pending.partial / "metadata.json", "wb")) as stream:
        stream.write(json.dumps(TORCH_DIST_CONFIG).encode())
    pending.writer.written["metadata.json"] = stream.entry()


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return str(error) or type(error).__name__


def _gathered(written: dict[str, FileChecksum]) -> list[dict[str, FileChecksum]]:
    """On rank 0 what each rank has, elsewhere nothing."""
    if dist.get_rank() != 0:
        dist.gather_object(written)
        return []
    parts: list[dict[str, FileChecksum]] = [{} for _ in range(dist.get_world_size())]
    dist.gather_object(written, parts)
    return parts


def _raise_first(error: Exception | None) -> None:
    """Raise on every rank what one of them met."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, _reason(error) if error else None)
    for reason in filter(None, reasons):
        raise UserError(reason)


def _from_rank_0(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
