"""megatron-core's loader of distributed checkpoints, made to trust nothing that it reads.

As it comes it unpickles `.metadata` and the objects among the tensors without restriction (torch's
`FileSystemReader.read_metadata` and `DefaultLoadPlanner.load_bytes`), so that a checkpoint from elsewhere could run
anything. Here the index is read by `reader.read_index`, and all else is looked through by `torch_files.check_file`
before torch's own restricted unpickler reads it.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, Metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_moe_lpr.checkpoint.format.reader import check_index, read_index
from megatron_moe_lpr.checkpoint.untrusted.extra_state import check_extra_states
from megatron_moe_lpr.checkpoint.untrusted.torch_files import Window, check_file, load_file, no_added_classes
from megatron_moe_lpr.errors import UserError

MAX_REASON = 300


def load_distributed(
    state: ShardedStateDict, directory: Path, strategy: LoadShardedStrategy | None = None, **options: Any
) -> Any:
    """`dist_checkpointing.load(state, directory, **options)`. Every rank must call it.

    Args:
        strategy: how ranks share the reading; by default each reads what it needs.

    Raises:
        UserError: on every rank: a file is missing, damaged, or holds something that no checkpoint needs.
    """
    strategy = strategy or strategies.TorchDistLoadShardedStrategy()
    try:
        with _restricted_readers():
            loaded = dist_checkpointing.load(
                state, str(directory), sharded_strategy=strategy, common_strategy=_CommonStrategy(), **options
            )
    except CheckpointException as error:
        raise _first_cause(error, directory) from error
    except (CheckpointingException, KeyError) as error:
        raise UserError(f"{directory}: cannot be loaded: {_line(error)}") from error
    check_extra_states(loaded[0] if isinstance(loaded, tuple) else loaded, directory)
    return loaded


class _Reader(FileSystemReader):
    """Reads the index once, by the names that an index needs."""

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(path)
        self._index: Metadata | None = None

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        if self._index is None:
            self._index = read_index(Path(self.path) / ".metadata")
            check_index(self._index, Path(self.path))
        storage = self._index.storage_meta or StorageMeta()
        storage.load_id = self.load_id
        self._index.storage_meta = storage
        return self._index

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        """Every tensor and object, before `FileSystemReader.read_data` unpickles it."""
        try:
            check_file(Window(file, sinfo.offset, sinfo.length))
        except Exception as error:  # damaged pickles and archives raise almost anything
            raise UserError(
                f"{Path(self.path) / sinfo.relative_path}: an entry cannot be read: {_line(error)}"
            ) from None
        return super()._slice_file(file, sinfo)


class _Planner(strategies.MCoreLoadPlanner):
    """Objects among the tensors (`_extra_state`, shared counters) as plain values and tensors alone."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        try:
            content = load_file(value)
        except Exception as error:  # damaged pickles and archives raise almost anything
            raise UserError(f"the object {key} cannot be read: {_line(error)}") from None
        # As in DefaultLoadPlanner, whose state dict is flattened by default.
        set_element(self.original_state_dict, self.mappings[key], content)


class _CommonStrategy(TorchCommonLoadStrategy):
    """common.pt as plain values and tensors alone, whatever TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        path = Path(checkpoint_dir) / COMMON_STATE_FNAME
        try:
            with open(path, "rb") as stream:
                content = load_file(stream)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; copy the checkpoint again") from None
        except Exception as error:  # damaged pickles and archives raise almost anything
            raise UserError(f"{path}: damaged, or not of a checkpoint: {_line(error)}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: not of a checkpoint: a dictionary is expected")
        return content

    def load_sharded_objects(self, sharded_objects_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> Any:
        raise UserError(f"{checkpoint_dir}: objects in files of their own are of an old format that is not read")


@contextlib.contextmanager
def _restricted_readers() -> Iterator[None]:
    """Put ours in the place of the classes that `TorchDistLoadShardedStrategy` takes from its module."""
    ours = {"FileSystemReader": _Reader, "CachedMetadataFileSystemReader": _Reader, "MCoreLoadPlanner": _Planner}
    before = {name: getattr(strategies, name) for name in ours}
    try:
        for name, value in ours.items():
            setattr(strategies, name, value)
        with no_added_classes():
            yield
    finally:
        for name, value in before.items():
            setattr(strategies, name, value)


def _first_cause(error: CheckpointException, directory: Path) -> UserError:
    """torch's collection of what went wrong on which rank, as one line."""
    rank, (cause, _) = min(error.failures.items())
    reason = str(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {_line(cause)}"
    place = "" if reason.startswith(str(directory)) else f"{directory}: cannot be loaded on rank {rank}: "
    return UserError(f"{place}{reason}")


def _line(error: BaseException) -> str:
    """An error's reason in one line; torch hides it behind advice to load without restriction."""
    lines = [line.strip("'\" ") for line in str(error).splitlines() if line.strip("'\" ")] or [type(error).__name__]
    advice = lines[0].startswith("Weights only load failed") and len(lines) > 1
    reason = lines[1 if advice else 0].rpartition("WeightsUnpickler error: ")[2]
    return reason.partition(": [")[0][:MAX_REASON]
