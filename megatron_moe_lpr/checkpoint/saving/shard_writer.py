"""The files of one rank's shard: planned with Megatron-Core, written by this process or by the writer process."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_moe_lpr.checkpoint.format.writer import save_tensor
from megatron_moe_lpr.checkpoint.saving.checkpoint_index import CheckpointIndex
from megatron_moe_lpr.checkpoint.saving.frozen_weights import FrozenWeights
from megatron_moe_lpr.checkpoint.saving.replicas import divide_copies
from megatron_moe_lpr.files.checksums import ChecksumStream, FileChecksum, OutputStream

FILES_PER_RANK = 2
BLOB_BYTES = 4096
"""Upper bound of what torch.save writes beside a tensor's values."""


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A file of this rank's shard, before it is written."""

    name: str
    items: list[tuple[WriteItem, Any]]
    """With their values: tensors on any device, or io.BytesIO."""

    @property
    def most_bytes(self) -> int:
        """Upper bound of the file's size."""
        return sum(BLOB_BYTES + _nbytes(data) for _, data in self.items)

    def write(self, stream: OutputStream) -> list[WriteResult]:
        """Write all items to `stream` from its position on; one at a time is copied into host memory."""
        results, begin = [], stream.tell()
        for item, data in self.items:
            offset = stream.tell() - begin
            if item.type == WriteItemType.BYTE_IO:
                stream.write(data.getbuffer())
            else:
                save_tensor(_with_own_storage(data), stream)
            length = stream.tell() - begin - offset
            results.append(WriteResult(item.index, length, _StorageInfo(self.name, offset, length)))
        return results


class ShardWriter:
    """Writes a rank's shard. Megatron-Core's writer would fork a trainer full of threads for it."""

    def __init__(self, path: Path) -> None:
        self.checkpoint_dir = path
        self.files: list[ShardFile] = []
        self.results: list[WriteResult] = []
        self.written: dict[str, FileChecksum] = {}
        self.error: Exception | None = None
        """What failed on this rank, kept until all ranks can be told."""

    def plan_files(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Decide what goes into which file, as FileSystemWriterAsync.prepare_write_data."""
        for index, items in enumerate(_split_by_size_and_type(FILES_PER_RANK, plan.items)):
            if items:
                name = f"__{dist.get_rank()}_{index}.distcp"
                self.files.append(ShardFile(name, [(item, planner.resolve_data(item)) for item in items]))

    def write_here(self) -> None:
        """Write the files from this process. An error is kept in `error` until all ranks can be told."""
        if self.error is not None:
            return
        try:
            for file in self.files:
                with ChecksumStream(open(Path(self.checkpoint_dir, file.name), "wb")) as stream:
                    self.results += file.write(stream)
                self.written[file.name] = stream.entry()
        except Exception as error:
            self.error = error
        finally:
            self.release()

    def release(self) -> None:
        """Drop the references to the tensors."""
        self.files = []

    def raise_error(self) -> None:
        """Raise what went wrong while this rank planned its shard."""
        if self.error is not None:
            raise self.error


class ShardStrategy:
    """Plans the shards of a run's saves, and the index of them all."""

    def __init__(self, frozen: FrozenWeights | None = None) -> None:
        """`frozen` gives the frozen weights that it announced in the state their values; None: all have values."""
        self.frozen = frozen
        self.index = CheckpointIndex()

    def async_save(self, state: ShardedStateDict, directory: Path) -> AsyncRequest:
        """Plan this rank's shard, as Megatron-Core's save strategy of this name. Every rank must call it.

        Args:
            state: sharded tensors and objects of this rank.

        Returns:
            A request whose function has the ShardWriter as its only argument, see `request_writer`.
        """
        divide_copies(state)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(state, keep_only_main_replica=True)
        writer = ShardWriter(directory)
        try:
            if self.frozen:
                self.frozen.fill(part for parts in by_key.values() for part in parts if isinstance(part, ShardedTensor))
        except Exception as error:
            # The other ranks go on to the exchange of plans: report it afterwards.
            writer.error = error
        # As save_state_dict_async_plan with ranks that plan on their own.
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(by_key), is_coordinator=dist.get_rank() == 0)
        plan = planner.create_decentralized_global_plan(planner.create_local_plan())
        try:
            self.index.plan(plan, planner)
        except ValueError as error:
            writer.error = error
        writer.plan_files(planner.finish_plan(plan), planner)
        return AsyncRequest(ShardWriter.write_here, [writer], [])


def request_writer(request: AsyncRequest) -> ShardWriter:
    """The ShardWriter of a request that `ShardStrategy.async_save` made."""
    (writer,) = request.async_fn_args
    return writer


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor with these values and no others in its storage: torch.save writes the whole storage of a view."""
    tensor = tensor.detach()
    if is_float8tensor(tensor):
        tensor = dequantize_fp8_tensor(tensor)
    tensor = tensor.cpu().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    # A new storage over the same memory: nothing is copied.
    values = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
    return values.view(tensor.dtype).view(tensor.shape)


def _nbytes(data: Any) -> int:
    if isinstance(data, torch.Tensor):
        # Weights in FP8 are written dequantised, in the dtype that the tensor reports.
        return data.numel() * data.element_size()
    return data.getbuffer().nbytes
