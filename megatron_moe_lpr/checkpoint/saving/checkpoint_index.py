"""The index of a checkpoint (`.metadata`), put together on rank 0 and kept from save to save.

Rank 0 gathers what each rank writes and where it lies, and checks that the slices make up whole tensors. Later saves of
a run have the same tensors in the same places: then the ranks exchange two numbers, and rank 0 writes the index that it
has. Nothing is sent to all ranks but these numbers.
"""

import dataclasses
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from megatron_moe_lpr.files.checksums import ChecksumStream, FileChecksum
from megatron_moe_lpr.parallel.every_rank import first_on_any_rank, gather_on_rank_0

INDEX_FILE = ".metadata"


class CheckpointIndex:
    """This rank's part of the index; on rank 0 also the whole."""

    def __init__(self) -> None:
        self.sent_plan: SavePlan | None = None
        self.sent_results: list[WriteResult] | None = None
        self.metadata: Metadata | None = None
        """On rank 0: tensors and their slices."""
        self.content: bytes | None = None
        """On rank 0: the file."""

    def plan(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Make known what this rank writes. Every rank must call it.

        Raises:
            ValueError: on rank 0: the slices of all ranks do not make up whole tensors.
        """
        if not _any_differs(plan, self.sent_plan):
            return
        self.sent_plan, self.metadata, self.content = plan, None, None
        plans = gather_on_rank_0(plan)
        if plans is not None:
            try:
                check_same_tensors(plans)
                _, self.metadata = planner.create_global_plan(plans)
            except BaseException:
                self.sent_plan = None  # so that the next save does not take the ranks' plans for known
                raise

    def complete(self, results: list[WriteResult]) -> None:
        """Make known where each item of this rank's plan was written. Every rank must call it."""
        # Where the content is lost, as after a new plan, rank 0 needs all results again.
        lost = dist.get_rank() == 0 and self.content is None
        if not _any_differs(results, None if lost else self.sent_results):
            return
        self.sent_results = results
        gathered = gather_on_rank_0(results)
        if gathered is not None and self.metadata is not None:
            places = {result.index: result.storage_data for part in gathered for result in part}
            index = dataclasses.replace(self.metadata, storage_data=places, storage_meta=StorageMeta())
            self.content = pickle.dumps(index)

    def write(self, directory: Path) -> dict[str, FileChecksum]:
        """On rank 0: write the file. Returns its entry of the checksum file.

        Raises:
            OSError: it cannot be written.
        """
        if self.content is None:
            raise RuntimeError("the index is written before all ranks' shards are known")
        with ChecksumStream(open(directory / INDEX_FILE, "wb")) as stream:
            stream.write(self.content)
        return {INDEX_FILE: stream.entry()}


def check_same_tensors(plans: Iterable[SavePlan]) -> None:
    """Check that ranks which write slices of a tensor agree on its shape and dtype.

    That slices neither overlap nor leave a hole is torch's check, in `create_global_plan`.

    Raises:
        ValueError: naming the tensor and the ranks.
    """
    known: dict[str, tuple[int, object]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            if item.tensor_data is None:
                continue
            form = (item.tensor_data.size, item.tensor_data.properties.dtype)
            first, expected = known.setdefault(item.index.fqn, (rank, form))
            if form != expected:
                raise ValueError(f"{item.index.fqn}: {expected} on rank {first}, {form} on rank {rank}")


def _any_differs(value: SavePlan | Sequence[WriteResult], sent: SavePlan | Sequence[WriteResult] | None) -> bool:
    return first_on_any_rank(None if value == sent else True) is not None
