"""The simulated worlds of benchmarks/world_growth.py: what is linear in them, and what does not grow."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner

from benchmarks.growth.shards import World, results, rows
from benchmarks.growth.start import measure_start
from benchmarks.growth.store import measure_store
from megatron_moe_lpr.checkpoint.saving.checkpoint_index import check_same_tensors

SIZES = (8, 16)


@pytest.mark.parametrize("size", SIZES)
def test_the_ranks_of_a_simulated_world_write_each_tensor_once(size):
    """torch itself checks that slices neither overlap nor leave a hole."""
    plans = [World(size).plan(rank) for rank in range(size)]
    check_same_tensors(plans)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    _, metadata = planner.create_global_plan(plans)
    weights = {key for key in metadata.state_dict_metadata if not key.startswith("optimizer.")}
    assert weights == {row.key for row in rows()}
    shares = [sum(result.storage_data.length for result in results(plan, 0)) for plan in plans]
    assert max(shares) < 1.1 * min(shares)  # all ranks write about the same
    assert max(len(pickle.dumps(plan)) for plan in plans) < 200_000


def test_keys_are_linear_and_what_ranks_read_is_one_size():
    small, large = (measure_store(size) for size in SIZES)
    assert [small.keys, large.keys] == [size + 1 for size in SIZES]
    assert (small.note, small.findings) == (large.note, large.findings)


def test_a_rank_is_in_as_many_groups_in_any_world():
    # In a process of its own: it makes the default process group, which one of other tests may be already.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        small, large = pool.map(measure_start, SIZES)
    assert small.own == large.own and small.groups < large.groups < 2 * small.groups
