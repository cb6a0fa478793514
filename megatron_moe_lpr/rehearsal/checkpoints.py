"""Loading and saving in a rehearsal: planned and exchanged as in a run, and no tensor is read or written.

What cannot be rehearsed on one rank is left out: the checks that all ranks together load every tensor of a checkpoint,
and that the slices which they write make up whole tensors. For these a rank would need to hear the others.
"""

import contextlib
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.futures import Future

from megatron_moe_lpr.checkpoint.format.chain import open_reader
from megatron_moe_lpr.checkpoint.format.reader import TensorInfo, is_model_key
from megatron_moe_lpr.checkpoint.loading import model_state
from megatron_moe_lpr.checkpoint.saving.checkpoint_index import CheckpointIndex
from megatron_moe_lpr.checkpoint.saving.frozen_weights import FrozenWeights
from megatron_moe_lpr.checkpoint.saving.optimizer_state import STATE_PREFIX
from megatron_moe_lpr.checkpoint.saving.shard_writer import ShardFile, ShardWriter
from megatron_moe_lpr.files.checksums import FileChecksum
from megatron_moe_lpr.megatron.overriding import replace
from megatron_moe_lpr.model.configuration.parameter_kinds import kind_of
from megatron_moe_lpr.parallel.every_rank import union_of_ranks
from megatron_moe_lpr.rehearsal.stand_ins import TENSOR_FILE, write_sizes
from megatron_moe_lpr.training.setup import Run

NO_CHECKSUM = 32 * "0"


@contextlib.contextmanager
def nothing_is_read() -> Iterator[None]:
    """Inside, loading leaves tensors as they are; what this rank does not ask for, others are taken to ask for."""
    with _replaced(
        (FileSystemReader, "read_data", _read_nothing),
        (model_state, "union_of_ranks", _union_with_all),
    ):
        yield


@contextlib.contextmanager
def _replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as before:
        for owner, name, value in replacements:
            before.callback(setattr, owner, name, getattr(owner, name))
            replace(owner, **{name: value})
        yield


def _read_nothing(*_: Any) -> Future[None]:
    done: Future[None] = Future()
    done.set_result(None)
    return done


def _union_with_all(names: Sequence[str], own: Collection[str]) -> set[str]:
    """`union_of_ranks` where every name is another rank's."""
    union_of_ranks(names, own)
    return set(names)


@contextlib.contextmanager
def sizes_are_written(run: Run) -> Iterator[list[tuple[str, int]]]:
    """Inside, a save names the files of this rank's shard and their bytes instead of writing them.

    The checkpoint that rank 0 completes has the sizes of the whole run's tensors and no content, and can be resumed.

    Yields:
        Name and bytes of each file, the values of its tensors alone; filled when the block ends.
    """
    files: list[tuple[str, int]] = []
    states: dict[str, torch.dtype] = {}

    def write_here(writer: ShardWriter) -> None:
        for file in writer.files:
            files.append((file.name, sum(map(_nbytes, (data for _, data in file.items)))))
            states.update(_states(file))
        writer.release()

    write_index = CheckpointIndex.write

    def write_index_of_sizes(index: CheckpointIndex, directory: Path) -> dict[str, FileChecksum]:
        tensors, places = write_sizes(directory, _all_sizes(run, states))
        index.content = pickle.dumps(Metadata(tensors, None, places, StorageMeta(), "1.0.0"))
        entry = FileChecksum((directory / TENSOR_FILE).stat().st_size, NO_CHECKSUM)
        return write_index(index, directory) | {TENSOR_FILE: entry}

    with _replaced(
        (ShardWriter, "write_here", write_here),
        (CheckpointIndex, "write", write_index_of_sizes),
        (FrozenWeights, "_read", lambda frozen, tensor: torch.empty(tensor.data.shape, dtype=tensor.dtype)),
        # Of all ranks' plans, which here are copies of this one's.
        (MCoreSavePlanner, "create_global_plan", lambda planner, plans: (plans, Metadata({}))),
    ):
        yield files


def _states(file: ShardFile) -> Iterator[tuple[str, torch.dtype]]:
    """Names and dtypes of the optimizer's states in a file."""
    for item, data in file.items:
        if item.index.fqn.startswith(f"{STATE_PREFIX}."):
            yield item.index.fqn.removeprefix(f"{STATE_PREFIX}.").partition(".")[0], data.dtype


def _all_sizes(run: Run, states: Mapping[str, torch.dtype]) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor in a checkpoint of the run, by key."""
    weights = {key: info for key, info in open_reader(run.model.directory).tensors.items() if is_model_key(key)}
    shape = run.model.shape
    trained = [key for key in weights if kind_of(key, shape.inserted_blocks, len(shape.new_tokens)) in run.stage.trains]
    moments = {
        f"{STATE_PREFIX}.{name}.{key}": TensorInfo(weights[key].shape, dtype)
        for name, dtype in states.items()
        for key in trained
    }
    return weights | moments


def _nbytes(data: Any) -> int:
    return data.nbytes if isinstance(data, torch.Tensor) else data.getbuffer().nbytes
