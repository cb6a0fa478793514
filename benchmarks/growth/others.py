"""What else many ranks might make dear: the check of the first step, index maps of the data, lines of a hang."""

import dataclasses
import time
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets import helpers
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_moe_lpr.engine import gradient_watch
from megatron_moe_lpr.parallel.first_rank import LONGEST_PAUSE
from megatron_moe_lpr.training.watchdog.hang_report import SHOWN

STEPS, SEQUENCE, DOCUMENT = 1000, 1024, 700


@dataclasses.dataclass(frozen=True)
class OtherCosts:
    """Of one world."""

    first_step: int
    """Bytes that a rank exchanges in the check that each trained parameter gets a gradient."""
    maps: float
    """Seconds of rank 0 to build index maps and a blend, for 1,000 steps of one sequence a rank."""
    questions: float
    """A second, of the ranks that wait for rank 0 meanwhile, once they have waited for 50 s."""
    lines: int
    """At most, of a hang: the first ranks, those that hang, and the one that has examined the notes."""


def measure_others(size: int) -> OtherCosts:
    """Count and measure."""
    return OtherCosts(_first_step(size), _index_maps(size), size / LONGEST_PAUSE, min(size, 2 * SHOWN + 1))


def _first_step(size: int) -> int:
    """Bytes of the collectives of GradientWatch.check, by torch's fake process group."""
    exchanged = []
    layer = torch.nn.Linear(2, 2)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        with mock.patch.object(gradient_watch, "unwrap", lambda module: module):  # the layer is no wrapped model
            watch = gradient_watch.GradientWatch([layer])
        layer(torch.ones(1, 2)).sum().backward()
        with mock.patch.object(dist, "all_reduce", lambda tensor, **options: exchanged.append(tensor.nbytes)):
            watch.check()
    finally:
        dist.destroy_process_group()
    return sum(exchanged)


def _index_maps(size: int) -> float:
    """Megatron-Core's maps, without a file system: the tokens of a sample, its place, and a blend of two datasets."""
    samples = STEPS * size
    sizes = np.full(samples * SEQUENCE // DOCUMENT + 2, DOCUMENT, dtype=np.int32)
    before = time.process_time()
    documents = np.arange(len(sizes), dtype=np.int32)
    np.random.default_rng(0).shuffle(documents)
    helpers.build_sample_idx(sizes, documents, SEQUENCE, 1, len(sizes) * DOCUMENT)
    places = np.arange(samples, dtype=np.uint32)
    np.random.default_rng(0).shuffle(places)
    which, where = np.zeros(samples, dtype=np.int16), np.zeros(samples, dtype=np.int64)
    helpers.build_blending_indices(which, where, np.array([0.7, 0.3]), 2, samples, False)
    return time.process_time() - before
