"""The world of one rehearsed rank: a process group in which nothing is sent, and which ranks stand for all others."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401 (registers the backend `fake`)
from megatron.core.parallel_state import RankGenerator

from megatron_moe_lpr.parallel.groups import destroy_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform.simulated import BACKEND

ORDER = "tp-cp-ep-dp-pp"
"""Megatron's default, by which `initialize_parallel` makes the groups (parallel_state.py)."""


@contextlib.contextmanager
def rank_of_world(rank: int, world_size: int, store: dist.Store) -> Iterator[None]:
    """Be one rank of a world of which no other rank is there; after the block its groups are gone.

    Args:
        store: what ranks that are rehearsed after each other share, as they would share a rendezvous.
    """
    dist.init_process_group(BACKEND, store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        destroy_parallel()


def sample_ranks(layout: ParallelLayout, world_size: int) -> list[int]:
    """One rank of each kind: of the first, a middle and the last pipeline rank the first rank, and the last one of its
    TP, EP and DP group. All others do the same with other numbers.

    `layout.check_world(world_size)` must have passed.
    """
    TP, PP, EP = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.expert_model_parallel_size,
    )
    dense = RankGenerator(tp=TP, ep=1, dp=world_size // (TP * PP), pp=PP, cp=1, order=ORDER)
    expert_tp = layout.expert_tensor_parallel_size
    expert = RankGenerator(tp=expert_tp, ep=EP, dp=world_size // (expert_tp * EP * PP), pp=PP, cp=1, order=ORDER)
    pipeline = next(group for group in dense.get_ranks("pp") if 0 in group)
    chosen = set()
    for first in {pipeline[0], pipeline[len(pipeline) // 2], pipeline[-1]}:
        for generator, dimension in ((dense, "tp"), (expert, "tp"), (expert, "ep"), (dense, "dp"), (expert, "dp")):
            group = next(group for group in generator.get_ranks(dimension) if first in group)
            chosen |= {first, group[-1]}
    return sorted(chosen)
