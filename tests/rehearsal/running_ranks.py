"""Records what real gloo ranks do while they do it: collectives, share of the data, shards and files of a save."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_moe_lpr.checkpoint.saving.optimizer_state import STATE_PREFIX
from megatron_moe_lpr.checkpoint.saving.shard_writer import ShardStrategy, ShardWriter
from megatron_moe_lpr.data.reading import batches
from megatron_moe_lpr.rehearsal.other_ranks import as_other_rank
from megatron_moe_lpr.rehearsal.record import Collective, RankRecord
from megatron_moe_lpr.rehearsal.shards import Shard, file_shards, state_shards
from tests.training.runs import train

OWN_PLACES = ("/megatron_moe_lpr/", "/megatron/core/")


def _no_tensor(group: Any, *_: Any) -> dict[str, Any]:
    return {}


def _tensors(group: Any, tensors: list[torch.Tensor], *_: Any) -> dict[str, Any]:
    return {"tensors": tensors}


def _second(group: Any, outputs: Any, inputs: Any, *_: Any) -> dict[str, Any]:
    flat = [inputs] if torch.is_tensor(inputs) else inputs
    return {"tensors": [part for parts in flat for part in (parts if isinstance(parts, list) else [parts])]}


def _rooted(group: Any, tensors: list[torch.Tensor], options: Any, *_: Any) -> dict[str, Any]:
    return {"tensors": tensors, "peer": options.rootRank}


def _gathered(group: Any, outputs: Any, inputs: list[torch.Tensor], options: Any, *_: Any) -> dict[str, Any]:
    return {"tensors": inputs, "peer": options.rootRank}


def _scattered(group: Any, outputs: list[torch.Tensor], inputs: Any, options: Any, *_: Any) -> dict[str, Any]:
    return {"tensors": outputs, "peer": options.rootRank}


def _exchanged(group: Any, output: torch.Tensor, source: torch.Tensor, received: list, sent: list, *_: Any) -> dict:
    def elements(tensor: torch.Tensor, rows: list[int]) -> tuple[int, ...]:
        counts = [int(count) for count in rows] or [len(tensor) // group.size()] * group.size()
        return tuple(count * (tensor[0].numel() if len(tensor) else 0) for count in counts)

    return {"tensors": [source], "sizes": elements(source, sent), "received": elements(output, received)}


def _point_to_point(group: Any, tensors: list[torch.Tensor], peer: int, *_: Any) -> dict[str, Any]:
    return {"tensors": tensors, "peer": peer}


METHODS: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
    "allreduce": ("all_reduce", _tensors),
    "allgather": ("all_gather", _second),
    "_allgather_base": ("all_gather", _second),
    "all_gather_single": ("all_gather", _second),
    "reduce_scatter": ("reduce_scatter", _second),
    "_reduce_scatter_base": ("reduce_scatter", _second),
    "reduce_scatter_single": ("reduce_scatter", _second),
    "alltoall_base": ("all_to_all", _exchanged),
    "all_to_all_single": ("all_to_all", _exchanged),
    "broadcast": ("broadcast", _rooted),
    "reduce": ("reduce", _rooted),
    "gather": ("gather", _gathered),
    "scatter": ("scatter", _scattered),
    "send": ("send", _point_to_point),
    "recv": ("recv", _point_to_point),
    "barrier": ("barrier", _no_tensor),
}
"""By method of `ProcessGroup`: the collective, and how its arguments say what it moves."""


class Waited:
    """torch's Work of a send or receive, which notes where it is waited for."""

    def __init__(self, work: Any, note: Callable[[], None]) -> None:
        self.work, self.note = work, note

    def wait(self, *arguments: Any) -> bool:
        self.note()
        return self.work.wait(*arguments)

    def is_completed(self) -> bool:
        return self.work.is_completed()


class RunningRank:
    """What this rank does inside `recorded`."""

    def __init__(self) -> None:
        self.record = RankRecord(dist.get_rank())
        self.held: list[Shard] = []
        self.written: list[Shard] = []
        self.described: list[tuple[set, set]] = []
        """Slices that another rank has described, and those that it was expected to describe."""

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        with contextlib.ExitStack() as before:
            for name, (kind, describe) in METHODS.items():
                if hasattr(dist.ProcessGroup, name):
                    original = getattr(dist.ProcessGroup, name)
                    _set(before, dist.ProcessGroup, name, self._method(kind, describe, original))
            _set(before, batches, "rank_samples", self._samples(batches.rank_samples))
            _set(before, ShardStrategy, "async_save", self._planned(ShardStrategy.async_save))
            _set(before, ShardWriter, "plan_files", self._files(ShardWriter.plan_files))
            _set(before, dist, "all_gather_object", self._exchange(dist.all_gather_object))
            yield

    def _exchange(self, original: Callable) -> Callable:
        def all_gather_object(object_list: list, obj: Any, group: Any = None) -> None:
            original(object_list, obj, group=group)
            if not isinstance(obj, list) or not all(isinstance(one, ShardedTensor) for one in obj):
                return
            place, ranks = dist.get_rank(group), dist.get_process_group_ranks(group)
            for other, described in enumerate(object_list):
                expected = as_other_rank(obj, ranks, place, other)
                self.described.append((_slices(described), _slices(expected)))

        return all_gather_object

    def _method(self, kind: str, describe: Callable[..., dict[str, Any]], original: Callable) -> Callable:
        def method(group: Any, *arguments: Any, **options: Any) -> Any:
            place = len(self.record.collectives)
            self.record.collectives.append(_collective(kind, group, **describe(group, *arguments)))
            work = original(group, *arguments, **options)
            return Waited(work, lambda: self._wait(place)) if kind in ("send", "recv") else work

        return method

    def _wait(self, place: int) -> None:
        calls = self.record.collectives
        object.__setattr__(calls[place], "awaited", len(calls) - place - 1)

    def _samples(self, original: Callable) -> Callable:
        def rank_samples(*arguments: int) -> Any:
            samples = original(*arguments)
            self.record.data.setdefault("samples", samples)
            return samples

        return rank_samples

    def _planned(self, original: Callable) -> Callable:
        def async_save(strategy: Any, state: dict, *arguments: Any, **options: Any) -> Any:
            self.held = state_shards(
                self.record.rank, [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
            )
            return original(strategy, state, *arguments, **options)

        return async_save

    def _files(self, original: Callable) -> Callable:
        def plan_files(writer: ShardWriter, *arguments: Any) -> None:
            original(writer, *arguments)
            self.written = file_shards(self.record.rank, writer.files)

        return plan_files


def _slices(tensors: list[ShardedTensor]) -> set[tuple]:
    weights = [tensor for tensor in tensors if not tensor.key.startswith(STATE_PREFIX)]
    return {(one.key, tuple(one.global_offset), tuple(one.local_shape), one.replica_id) for one in weights}


def _set(before: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    before.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _collective(kind: str, group: Any, tensors: Any = (), peer: int | None = None, **sizes: Any) -> Collective:
    ranks = tuple(dist.get_process_group_ranks(group))
    return Collective(
        kind=kind,
        ranks=ranks,
        group=group.group_desc,
        dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
        bytes=sum(tensor.nbytes for tensor in tensors),
        peer=None if peer is None else ranks[peer],
        site=_site(),
        **sizes,
    )


def _site() -> str:
    """The innermost place of the package or of Megatron-Core."""
    frame = sys._getframe(3)
    while frame is not None:
        path = frame.f_code.co_filename
        for place in OWN_PLACES:
            if place in path:
                return f"{path.rpartition(place)[2]}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def record_training(load: Path, save: Path, data: dict[str, str], **changes: Any) -> RunningRank:
    """On every rank of a pool: train, recorded."""
    rank = RunningRank()
    with rank.recorded():
        train(load, save, data, **changes)
    files = {shard.file for shard in rank.written}
    iteration = save / f"iter_{changes['train_iters']:07d}"
    rank.record.files = [(name, (iteration / name).stat().st_size) for name in sorted(files)]
    samples = rank.record.data["samples"]
    size = changes["global_batch_size"] // changes["micro_batch_size"]
    rank.record.data["samples"] = [list(samples[place]) for place in range(min(len(samples), size))]
    return rank
