import os
import subprocess
import sys

import pytest
import torch

from megatron_moe_lpr.data.reading.batches import BATCH_KEYS, build_data_iterator
from megatron_moe_lpr.errors import UserError
from tests.data.builders import NO_CUDA_LINE


class Numbers(torch.utils.data.Dataset):
    """Sample i is made of the number i."""

    def __len__(self):
        return 100

    def __getitem__(self, index):
        return {key: torch.full((3,), index) for key in BATCH_KEYS}


def numbers(consumed, micro_batch, rank, ranks, **options):
    return [
        batch["tokens"][:, 0].tolist()
        for batch in build_data_iterator(Numbers(), consumed, micro_batch, rank, ranks, **options)
    ]


def test_ranks_are_disjoint_and_complete():
    ranks = [numbers(0, 2, rank, 4) for rank in range(4)]
    assert ranks[1][:2] == [[2, 3], [10, 11]]
    assert [len(rank) for rank in ranks] == [12] * 4
    assert sorted(number for rank in ranks for batch in rank for number in batch) == list(range(96))


@pytest.mark.parametrize(("micro_batch", "ranks"), [(1, 1), (4, 1), (2, 2), (1, 4), (1, 8)])
def test_a_global_batch_is_the_same_for_every_layout(micro_batch, ranks):
    micro_batches = 8 // (micro_batch * ranks)
    for step in range(5):
        found = [numbers(step * 8, micro_batch, rank, ranks)[:micro_batches] for rank in range(ranks)]
        assert sorted(number for rank in found for batch in rank for number in batch) == list(
            range(step * 8, step * 8 + 8)
        )


def test_resumes_from_the_consumed_samples():
    assert numbers(24, 2, 1, 3) == numbers(0, 2, 1, 3)[4:]


def test_worker_processes_keep_the_order():
    assert numbers(0, 2, 1, 2, num_workers=2) == numbers(0, 2, 1, 2)


LEAVES = """
import atexit, sys, time
# Runs after what the iterator does at the end of Python.
atexit.register(time.sleep, 0.5)
from tests.data.reading.test_batches import Numbers, build_data_iterator
iterator = build_data_iterator(Numbers(), 0, 2, 0, 1, num_workers=2)
next(iterator)
sys.exit("error: a full disk")
"""


def test_an_end_in_the_midst_of_the_data_says_nothing_of_workers():
    """torch told of killed workers, as a traceback behind the line that said why the run ended."""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", LEAVES], env=environment, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if NO_CUDA_LINE not in line]
    assert (done.returncode, lines) == (1, ["error: a full disk"])


def test_end_of_the_data_is_said():
    with pytest.raises(UserError, match="the data ends: 98 of 100 samples"):
        build_data_iterator(Numbers(), 98, 2, 0, 2)


def test_shapes():
    batch = next(build_data_iterator(Numbers(), 0, 4, 0, 1))
    assert set(batch) == set(BATCH_KEYS) and all(tensor.shape == (4, 3) for tensor in batch.values())
