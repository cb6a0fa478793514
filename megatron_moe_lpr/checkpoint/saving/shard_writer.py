"""The files of one rank's shard: planned by Megatron-Core, written by this process or by the writer process."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    _split_by_size_and_type,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch.distributed.checkpoint.api import WRAPPED_EXCEPTION, _wrap_exception
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_moe_lpr.checkpoint.format.writer import save_tensor
from megatron_moe_lpr.checkpoint.saving.frozen_weights import FrozenWeights
from megatron_moe_lpr.files.checksums import ChecksumStream, FileChecksum, OutputStream
from megatron_moe_lpr.megatron.overriding import override, overrides_megatron

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


@overrides_megatron
class ShardWriter(FileSystemWriterAsync):
    """Megatron-Core's writer without its processes, for each of which it would fork a trainer full of threads."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, thread_count=FILES_PER_RANK)
        self.files: list[ShardFile] = []
        self.results: list[WriteResult] = []
        self.written: dict[str, FileChecksum] = {}
        self.error: Exception | None = None
        """What failed on this rank; `retrieve_write_results` reports it to all ranks."""
        self.index_error: OSError | None = None
        """Why rank 0 could not write the index (`finish`)."""

    @override
    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Decide what goes into which file."""
        for index, items in enumerate(_split_by_size_and_type(self.thread_count, plan.items)):
            if items:
                name = f"{plan.storage_data.prefix}{index}.distcp"
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

    @override
    def retrieve_write_results(self) -> list[WriteResult] | WRAPPED_EXCEPTION:
        """Where each item was written, or this rank's error. Megatron-Core gathers it on rank 0."""
        if self.error is None:
            return self.results
        try:
            raise self.error
        except Exception as error:
            return _wrap_exception(error)

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0: write the index of all ranks' tensors, without the ranks' plans, which nothing here reads."""
        vars(metadata).pop("all_local_plans", None)
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_meta = self.storage_meta()
        try:
            with ChecksumStream(open(Path(self.checkpoint_dir, ".metadata"), "wb")) as stream:
                pickle.dump(metadata, stream)
            self.written[".metadata"] = stream.entry()
        except OSError as error:
            self.index_error = error

    def raise_error(self) -> None:
        """Raise what went wrong while this rank planned its shard."""
        if self.error is not None:
            raise self.error

    def raise_index_error(self) -> None:
        """Raise the error of `finish`. Raised there, it would leave the other ranks waiting inside Megatron."""
        if self.index_error is not None:
            raise self.index_error


@overrides_megatron
class ShardStrategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's save strategy with ShardWriter in place of its own writer."""

    def __init__(self, frozen: FrozenWeights | None = None) -> None:
        """`frozen` gives the frozen weights that it announced in the state their values; None: all have values."""
        super().__init__("torch_dist", 1, thread_count=FILES_PER_RANK)
        self.frozen = frozen

    @override
    def async_save(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, async_strategy: str = "mcore"
    ) -> AsyncRequest:
        """Plan this rank's shard. Every rank must call it.

        Args:
            async_strategy: from megatron-core 0.17 on, whose writer process writes: none of them does, `ShardWriter` is
                ours.

        Returns:
            A request whose function has the ShardWriter as its only argument, see `request_writer`.
        """
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        writer = ShardWriter(checkpoint_dir)
        if self.frozen:
            try:
                self.frozen.fill(part for parts in by_key.values() for part in parts if isinstance(part, ShardedTensor))
            except Exception as error:
                # The other ranks are already in the collectives of the planning: report it afterwards.
                writer.error = error
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planned, *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(by_key), writer, None, 0, planner=planner)

        def finalize() -> None:
            save_state_dict_async_finalize(*planned)

        return AsyncRequest(ShardWriter.write_here, [writer], [finalize])


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
