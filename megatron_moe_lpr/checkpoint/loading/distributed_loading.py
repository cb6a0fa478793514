"""megatron-core's loader of distributed checkpoints, changed so that it can read untrusted checkpoints.

megatron-core unpickles `.metadata` and the objects among the tensors without restriction (torch's
`FileSystemReader.read_metadata` and `DefaultLoadPlanner.load_bytes`), so that an untrusted checkpoint could run any
code. Here `reader.read_index` reads the index, and `torch_files.check_file` checks everything else before torch's
restricted unpickler reads it.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, Metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import _wrap_exception
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_moe_lpr.checkpoint.format.common_state import read_common
from megatron_moe_lpr.checkpoint.format.reader import check_index, read_index
from megatron_moe_lpr.checkpoint.untrusted.extra_state import check_extra_states
from megatron_moe_lpr.checkpoint.untrusted.torch_files import (
    Window,
    check_file,
    load_file,
    no_added_classes,
    reason_in_one_line,
)
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.megatron import versions
from megatron_moe_lpr.megatron.overriding import override, overrides_megatron, replace
from megatron_moe_lpr.parallel.every_rank import first_on_any_rank


@overrides_megatron
class LoadStrategy(strategies.TorchDistLoadShardedStrategy):
    """Megatron's way to read tensors, unrounded, and with an error of one rank on every rank."""

    def __init__(self) -> None:
        super().__init__(**versions.strategy_options())

    @override
    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path, *options: Any) -> Any:
        """Read what this rank needs. Every rank must call it equally often.

        Raises:
            CheckpointException: on every rank: one of them could not.
        """
        if not versions.reads_on_its_own():
            return super().load(sharded_state_dict, checkpoint_dir, *options)
        loaded = failure = None
        try:
            loaded = super().load(sharded_state_dict, checkpoint_dir, *options)
        except CheckpointException as error:
            failure = min(error.failures.items())[1]
        except Exception as error:
            failure = _wrap_exception(error)
        if first := first_on_any_rank(failure):
            raise CheckpointException("load", dict([first]))
        return loaded


def load_distributed(
    state: ShardedStateDict,
    directory: Path,
    strategy: LoadStrategy | FullyParallelLoadStrategyWrapper | None = None,
    **options: Any,
) -> Any:
    """`dist_checkpointing.load(state, directory, **options)`. Every rank must call it.

    Args:
        strategy: how the reading is divided among ranks; by default each rank reads what it needs.

    Raises:
        UserError: on every rank: a file is missing, damaged, or holds something that no checkpoint needs.
    """
    strategy = strategy or LoadStrategy()
    # Its check that ranks ask for whole tensors would send every rank's description of its state to every rank. The
    # states of a model are checked with each save (saving/checkpoint_index.py).
    options |= {"validate_access_integrity": False}
    if versions.has_common_strategies():
        options |= {"common_strategy": _common_strategy()}
    try:
        with _restricted_readers():
            loaded = dist_checkpointing.load(state, str(directory), sharded_strategy=strategy, **options)
    except CheckpointException as error:
        raise _first_cause(error, directory) from error
    except (CheckpointingException, KeyError) as error:
        raise UserError(f"{directory}: cannot be loaded: {reason_in_one_line(error)}") from error
    check_extra_states(loaded[0] if isinstance(loaded, tuple) else loaded, directory)
    return loaded


@overrides_megatron
class _Reader(FileSystemReader):
    """Reads the index once, by the names that an index needs."""

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(path)
        self._index: Metadata | None = None

    @override
    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        if self._index is None:
            self._index = read_index(Path(self.path) / ".metadata")
            check_index(self._index, Path(self.path))
        storage = self._index.storage_meta or StorageMeta()
        storage.load_id = self.load_id
        self._index.storage_meta = storage
        return self._index

    @override
    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        """Every tensor and object, before `FileSystemReader.read_data` unpickles it."""
        try:
            check_file(Window(file, sinfo.offset, sinfo.length))
        except Exception as error:  # damaged pickles and archives raise almost anything
            raise UserError(
                f"{Path(self.path) / sinfo.relative_path}: an entry cannot be read: {reason_in_one_line(error)}"
            ) from None
        return super()._slice_file(file, sinfo)


@overrides_megatron
class _Planner(strategies.MCoreLoadPlanner):
    """Objects among the tensors (`_extra_state`, shared counters) as plain values and tensors alone."""

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        try:
            content = load_file(value)
        except Exception as error:  # damaged pickles and archives raise almost anything
            raise UserError(f"the object {key} cannot be read: {reason_in_one_line(error)}") from None
        # As in DefaultLoadPlanner.
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], content)
        else:
            self.state_dict[key] = content


def _common_strategy() -> Any:
    """What reads common.pt in megatron-core 0.16; such a class is all that it takes there."""
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    @overrides_megatron
    class CommonStrategy(TorchCommonLoadStrategy):
        @override
        def load_common(self, checkpoint_dir: str | Path) -> Any:
            return read_common(Path(checkpoint_dir))

        @override
        def load_sharded_objects(self, sharded_objects_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> Any:
            raise UserError(f"{checkpoint_dir}: objects in files of their own are of an old format that is not read")

    return CommonStrategy()


@contextlib.contextmanager
def _restricted_readers() -> Iterator[None]:
    """Put ours in the place of what Megatron's loader takes from its modules to read files."""
    ours: list[tuple[Any, str, Any]] = [
        (strategies, "_get_filesystem_reader", lambda directory, *arguments, **options: _Reader(directory)),
        (strategies, "MCoreLoadPlanner", _Planner),
    ]
    if not versions.has_common_strategies():
        ours.append((serialization, versions.common_reader(), lambda directory: read_common(Path(directory))))
    with contextlib.ExitStack() as before:
        for owner, name, value in ours:
            before.callback(setattr, owner, name, getattr(owner, name))
            replace(owner, **{name: value})
        before.enter_context(no_added_classes())
        yield


def _first_cause(error: CheckpointException, directory: Path) -> UserError:
    """torch's collection of what went wrong on which rank, as one line."""
    rank, (cause, _) = min(error.failures.items())
    reason = str(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {reason_in_one_line(cause)}"
    place = "" if reason.startswith(str(directory)) else f"{directory}: cannot be loaded on rank {rank}: "
    return UserError(f"{place}{reason}")
