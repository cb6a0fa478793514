"""Datasets to micro-batches: which samples a data-parallel rank gets, and in what order."""

import atexit
import contextlib
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader

from megatron_moe_lpr.data.reading.training_dataset import TrainingDataset
from megatron_moe_lpr.data.reading.validation_dataset import ValidationDataset
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.processes import STOP_SIGNALS, end_with_parent, shielded_from

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "language")

Batch = dict[str, torch.Tensor]
"""BATCH_KEYS to tensors [batch, sequence]: `loss_mask` float32, the others int64."""


def build_data_iterator(
    dataset: TrainingDataset,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Micro-batches of one data-parallel rank, from sample `consumed_samples` of the run on.

    Ranks take turns: of each `micro_batch_size * data_parallel_size` consecutive samples rank r gets the r-th part.
    So a global batch holds the same samples for every layout, and the position in the data is `consumed_samples`
    alone. All ranks of a tensor- or pipeline-parallel group pass the same arguments and get equal batches. Ends with
    the dataset; an incomplete round at its end is left out.

    Args:
        dataset: from `build_training_dataset`.
        consumed_samples: samples that the run has used so far, on all ranks together.
        micro_batch_size: samples a micro-batch.
        data_parallel_rank: from 0.
        data_parallel_size: number of ranks.
        num_workers: processes that load ahead; 0: load here.
        pin_memory: put batches into page-locked memory, for copies to a GPU.

    Raises:
        UserError: no samples are left.
    """
    step = micro_batch_size * data_parallel_size
    if consumed_samples + step > len(dataset):
        raise UserError(f"the data ends: {consumed_samples:,} of {len(dataset):,} samples are used; train for fewer")
    rounds = range(consumed_samples, len(dataset) - step + 1, step)
    first = data_parallel_rank * micro_batch_size
    indices = _Indices(rounds, first, micro_batch_size)
    return _start(_loader(dataset, indices, num_workers, pin_memory))


def build_validation_iterator(
    dataset: ValidationDataset,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    micro_batch_multiple: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Micro-batches of one rank that together, over all ranks, hold every sample of the dataset once.

    Every rank gets `count_validation_micro_batches` of them, filled up with padding samples, so the sums of the loss
    and of the loss mask are exact for every layout.
    """
    count = count_validation_micro_batches(dataset, micro_batch_size, data_parallel_size, micro_batch_multiple)
    step = micro_batch_size * data_parallel_size
    indices = _Indices(range(0, count * step, step), data_parallel_rank * micro_batch_size, micro_batch_size)
    return _start(_loader(dataset, indices, num_workers, pin_memory))


def count_validation_micro_batches(
    dataset: ValidationDataset, micro_batch_size: int, data_parallel_size: int, micro_batch_multiple: int = 1
) -> int:
    """Micro-batches each rank runs for one pass; a multiple of `micro_batch_multiple` (micro-batches a step)."""
    samples = micro_batch_size * data_parallel_size * micro_batch_multiple
    return -(-len(dataset) // samples) * micro_batch_multiple


class _Indices:
    """Of each round's start, the indices of one rank's micro-batch."""

    def __init__(self, rounds: range, first: int, micro_batch_size: int) -> None:
        self.rounds, self.first, self.micro_batch_size = rounds, first, micro_batch_size

    def __len__(self) -> int:
        return len(self.rounds)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.rounds:
            yield list(range(start + self.first, start + self.first + self.micro_batch_size))


def _loader(
    dataset: TrainingDataset | ValidationDataset, indices: _Indices, num_workers: int, pin_memory: bool
) -> DataLoader:
    # Forked loaders share the memory-mapped indexes; any other start would copy them into each.
    context = "fork" if num_workers else None
    return DataLoader(
        dataset,
        batch_sampler=indices,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        multiprocessing_context=context,
        worker_init_fn=_start_worker if num_workers else None,
    )


def _start(loader: DataLoader) -> Iterator[Batch]:
    """Its workers don't hear what a batch system tells every process: the rank needs them for its last step."""
    others = set(multiprocessing.active_children())
    with shielded_from(STOP_SIGNALS):
        iterator = iter(loader)
    # Python ends what is left of them by SIGTERM when this process ends, and would wait for ever: they don't hear it.
    atexit.register(_kill, set(multiprocessing.active_children()) - others)
    return iterator


def _kill(workers: set[BaseProcess]) -> None:
    # torch's handler would raise for each, in the midst of whatever else ends with Python.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        with contextlib.suppress(ValueError):  # closed already
            worker.kill()


def _start_worker(number: int) -> None:
    end_with_parent()


def collate(samples: Sequence[Batch]) -> Batch:
    """Stack samples [sequence] to a batch [batch, sequence]."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in BATCH_KEYS}
