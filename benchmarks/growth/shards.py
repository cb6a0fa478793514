"""What each rank of a simulated world writes to a checkpoint: real names, shapes and cuts, and no values."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from benchmarks.communication import LLAMA
from megatron_moe_lpr.checkpoint.saving.optimizer_state import STATE_PREFIX, rectangles
from megatron_moe_lpr.checkpoint.saving.replicas import writers
from megatron_moe_lpr.checkpoint.saving.shard_writer import FILES_PER_RANK
from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, Row, model_rows
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.training.configuration.stages import STAGES

EXPERTS = 5
LAYOUT = ParallelLayout(tensor_model_parallel_size=2, expert_model_parallel_size=4)
STATES = ("fp32_param", "exp_avg", "exp_avg_sq")
LEAST_BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Elements of a bucket of gradients in Megatron-Core (distributed_data_parallel.py): at least, and for each rank."""


@dataclasses.dataclass(frozen=True)
class World:
    """Llama-3-8B with four new experts a layer, in stage 1, on `size` ranks with TP 2 and EP 4."""

    size: int

    @property
    def data_ranks(self) -> int:
        """Ranks that hold the same dense weights."""
        return self.size // LAYOUT.tensor_model_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold the same experts."""
        return self.size // LAYOUT.expert_model_parallel_size

    def plan(self, rank: int) -> SavePlan:
        """What the rank writes."""
        tensor_rank, expert_rank = rank % LAYOUT.tensor_model_parallel_size, rank % LAYOUT.expert_model_parallel_size
        copies = (
            (_copies(tensor_rank, False), self.data_ranks, rank // LAYOUT.tensor_model_parallel_size),
            (_copies(expert_rank, True), self.expert_ranks, rank // LAYOUT.expert_model_parallel_size),
        )
        items = [
            _item(copy.key, copy.global_shape, copy.global_offset, copy.local_shape, copy.dtype)
            for own, count, index in copies
            for copy, writer in zip(own, _writers(own, count), strict=True)
            if writer == index
        ]
        return SavePlan(
            [*items, *self._states(expert_rank, rank // LAYOUT.expert_model_parallel_size)], planner_data={}
        )

    def _states(self, expert_rank: int, index: int) -> Iterator[WriteItem]:
        """The rank's part of the optimizer's state of the new experts: an equal part of each bucket of gradients."""
        for bucket in _buckets(expert_rank, max(LEAST_BUCKET, BUCKET_PER_RANK * self.data_ranks)):
            size = -(-sum(math.prod(row.shape) for row in bucket) // self.expert_ranks)
            begin, first = index * size, 0
            for row in bucket:
                count = math.prod(row.shape)
                low, high = max(begin, first), min(begin + size, first + count)
                for offsets, sizes in rectangles(row.shape, low - first, high - first):
                    for state in STATES:
                        key = f"{STATE_PREFIX}.{state}.{row.key}"
                        yield _item(key, row.shape, offsets, sizes, torch.float32)
                first += count


def results(plan: SavePlan, rank: int) -> list[WriteResult]:
    """Where the rank's items lie, as its writer says after it has written them."""
    ends = [0] * FILES_PER_RANK
    found = []
    for item, file in zip(plan.items, itertools.cycle(range(FILES_PER_RANK)), strict=False):
        length = math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        place = _StorageInfo(f"__{rank}_{file}.distcp", ends[file], length)
        ends[file] += length
        found.append(WriteResult(item.index, length, place))
    return found


@functools.cache
def rows() -> tuple[Row, ...]:
    """All tensors of the model."""
    shape = ModelShape(read_architecture(LLAMA), (EXPERTS,) * LLAMA["num_hidden_layers"])
    return tuple(model_rows(shape.architecture, shape.experts_per_layer, DENSE_LAYOUT))


@functools.cache
def _copies(part: int, experts: bool) -> tuple[ShardedTensor, ...]:
    """Tensors that a rank holds in common with others: of its TP rank, or the experts of its EP rank."""
    found = []
    for row in rows():
        if (row.kind is ParameterKind.NEW_EXPERTS) != experts:
            continue
        if experts:
            if _expert(row) % LAYOUT.expert_model_parallel_size == part:
                found.append(_tensor(row, row.shape, 0))
        else:
            # Split by rows or not at all: which of them does not matter for the sizes of messages.
            splits = len(row.shape) > 1 and not row.kind.is_router
            local = (row.shape[0] // LAYOUT.tensor_model_parallel_size, *row.shape[1:]) if splits else row.shape
            if splits or part == 0:
                found.append(_tensor(row, local, part * local[0] if splits else 0))
    return tuple(found)


@functools.cache
def _writers(copies: tuple[ShardedTensor, ...], count: int) -> list[int]:
    return writers(copies, count)


@functools.cache
def _buckets(expert_rank: int, least: int) -> list[list[Row]]:
    """The experts that train on an EP rank, in buckets of at least so many elements."""
    trained = [row for row in rows() if row.kind in STAGES["1"].trains and row.kind is ParameterKind.NEW_EXPERTS]
    buckets: list[list[Row]] = [[]]
    for row in reversed([row for row in trained if _expert(row) % LAYOUT.expert_model_parallel_size == expert_rank]):
        if sum(math.prod(held.shape) for held in buckets[-1]) >= least:
            buckets.append([])
        buckets[-1].append(row)
    return buckets


def _expert(row: Row) -> int:
    return int(re.search(r"\.experts\.(\d+)\.", row.key)[1])


def _tensor(row: Row, local: Sequence[int], first: int) -> ShardedTensor:
    dtype = torch.float32 if row.kind.is_router else torch.bfloat16
    offset = (first, *[0] * (len(row.shape) - 1))
    return _Copy(row.key, None, dtype, tuple(local), tuple(row.shape), offset, None)


class _Copy(ShardedTensor):
    """Hashable by identity, for the caches above."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def _item(
    key: str, whole: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], dtype: torch.dtype
) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(whole))
    return WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
