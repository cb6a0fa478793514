"""Datasets to micro-batches: which samples a data-parallel rank gets, and in what order."""

from collections.abc import Iterator, Sequence

import torch

from megatron_moe_lpr.data.reading.loading import Batch, BatchIterator
from megatron_moe_lpr.data.reading.training_dataset import TrainingDataset
from megatron_moe_lpr.data.reading.validation_dataset import ValidationDataset
from megatron_moe_lpr.errors import UserError

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "language")
"""Of a `Batch`, whose tensors are [batch, sequence]: `loss_mask` float32, the others int64."""


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
    return BatchIterator(dataset, indices, collate, num_workers, pin_memory)


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
    return BatchIterator(dataset, indices, collate, num_workers, pin_memory)


def count_validation_micro_batches(
    dataset: ValidationDataset, micro_batch_size: int, data_parallel_size: int, micro_batch_multiple: int = 1
) -> int:
    """Micro-batches each rank runs for one pass; a multiple of `micro_batch_multiple` (micro-batches a step)."""
    samples = micro_batch_size * data_parallel_size * micro_batch_multiple
    return -(-len(dataset) // samples) * micro_batch_multiple


class _Indices(Sequence):
    """Of each round's start, the indices of one rank's micro-batch."""

    def __init__(self, rounds: range, first: int, micro_batch_size: int) -> None:
        self.rounds, self.first, self.micro_batch_size = rounds, first, micro_batch_size

    def __len__(self) -> int:
        return len(self.rounds)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return _Indices(self.rounds[index], self.first, self.micro_batch_size)
        start = self.rounds[index] + self.first
        return list(range(start, start + self.micro_batch_size))


def collate(samples: Sequence[Batch]) -> Batch:
    """Stack samples [sequence] to a batch [batch, sequence]."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in BATCH_KEYS}
