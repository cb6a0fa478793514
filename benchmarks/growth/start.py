"""The start of a run on many ranks: Megatron-Core's process groups, and the index maps of the data."""

import contextlib
import dataclasses
import io
import time

import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.growth.shards import LAYOUT
from megatron_moe_lpr.files.checksum_file import _files_by_rank
from megatron_moe_lpr.files.checksums import FileChecksum


@dataclasses.dataclass(frozen=True)
class StartCosts:
    """Of one world."""

    groups: int
    """Process groups that every rank makes or, not being a member, takes part in making."""
    own: int
    """Those of them that rank 0 is a member of."""
    seconds: float
    """Of rank 0, without the connections, which a fake process group has none of."""
    division: float
    """Seconds in which each rank finds its files of a checkpoint of two files a rank, to verify them."""


def measure_start(size: int) -> StartCosts:
    """Make Megatron-Core's groups as rank 0 of a world of `size` ranks, by torch's fake process group."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    counts = {"groups": 0, "own": 0}
    make = dist.new_group

    def counted(ranks: list[int] | None = None, *arguments: object, **options: object) -> object:
        counts["groups"] += 1
        counts["own"] += ranks is None or 0 in ranks
        return make(ranks, *arguments, **options)

    dist.new_group = counted
    before = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=LAYOUT.tensor_model_parallel_size,
                expert_model_parallel_size=LAYOUT.expert_model_parallel_size,
                expert_tensor_parallel_size=LAYOUT.expert_tensor_parallel_size,
                create_gloo_process_groups=False,
            )
        seconds = time.process_time() - before
    finally:
        dist.new_group = make
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return StartCosts(**counts, seconds=seconds, division=_division(size))


def _division(size: int) -> float:
    entries = {f"__{rank}_{file}.distcp": FileChecksum(10**9 + rank, "") for rank in range(size) for file in range(2)}
    before = time.process_time()
    _files_by_rank(entries, size)
    return time.process_time() - before
