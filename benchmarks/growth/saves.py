"""The index of a checkpoint of many ranks: its size, and rank 0's seconds for it."""

import dataclasses
import pickle
import time
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner

from benchmarks.growth.shards import World, results
from megatron_moe_lpr.checkpoint.format.reader import read_index
from megatron_moe_lpr.checkpoint.saving import checkpoint_index
from megatron_moe_lpr.checkpoint.saving.checkpoint_index import INDEX_FILE, CheckpointIndex
from megatron_moe_lpr.files.checksum_file import CHECKSUM_FILE, read_checksums, write_checksums
from megatron_moe_lpr.files.checksums import FileChecksum
from megatron_moe_lpr.platform.collectives import world_of_one


@dataclasses.dataclass(frozen=True)
class SaveCosts:
    """Of one world."""

    message: int
    """Bytes of the largest plan and results of a rank, which rank 0 gets from each before the first save."""
    all_messages: int
    entries: int
    """Slices of tensors in the index."""
    index: int
    """Bytes of the index."""
    checksums: int
    """Bytes of the checksum file."""
    files: int
    first: float
    """Seconds of rank 0 in the first save of a run, without its own shard."""
    later: float
    """The same in each later save."""
    read: float
    """Seconds in which a rank reads and checks the index, when the run resumes."""


def measure_saves(world: World, directory: Path) -> SaveCosts:
    """Simulate two saves of a run: the ranks' messages are made first, as the other ranks would."""
    plans = [world.plan(rank) for rank in range(world.size)]
    found = [results(plan, rank) for rank, plan in enumerate(plans)]
    sent = [(pickle.dumps(plan), pickle.dumps(result)) for plan, result in zip(plans, found, strict=True)]
    names = sorted({result.storage_data.relative_path for part in found for result in part})
    for name in names:
        (directory / name).touch()
    entries = {name: FileChecksum(0, "0" * 32) for name in names}
    index = CheckpointIndex()
    before = time.process_time()
    _save(index, plans[0], found[0], sent, entries, directory)
    middle = time.process_time()
    _save(index, plans[0], found[0], sent, entries, directory)
    after = time.process_time()
    read_index(directory / INDEX_FILE)
    read_checksums(directory)
    return SaveCosts(
        message=max(len(plan) + len(result) for plan, result in sent),
        all_messages=sum(len(plan) + len(result) for plan, result in sent),
        entries=sum(map(len, found)),
        index=(directory / INDEX_FILE).stat().st_size,
        checksums=(directory / CHECKSUM_FILE).stat().st_size,
        files=len(list(directory.rglob("*"))) - 1,  # the directory of the checksum file is none
        first=middle - before,
        later=after - middle,
        read=time.process_time() - after,
    )


def _save(
    index: CheckpointIndex,
    plan: Any,
    result: Any,
    sent: list[tuple[bytes, bytes]],
    entries: dict[str, FileChecksum],
    directory: Path,
) -> None:
    """Rank 0's part in a save, as CheckpointSaver does it; what it gathers is unpickled as it would be."""
    gathered = {id(plan): 0, id(result): 1}

    def gather(value: Any) -> list[Any]:
        return [pickle.loads(parts[gathered[id(value)]]) for parts in sent]  # what this file has pickled

    with world_of_one(), mock.patch.object(checkpoint_index, "gather_on_rank_0", gather):
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        index.plan(plan, planner)
        index.complete(result)
    write_checksums(directory, entries | index.write(directory))
