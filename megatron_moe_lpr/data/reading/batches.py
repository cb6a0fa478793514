"""Which samples each data-parallel rank reads, in which order, as micro-batches."""

from collections.abc import Iterator, Sequence

import torch

from megatron_moe_lpr.data.reading.documents import BOUNDARIES, DOCUMENT, cumulative_lengths
from megatron_moe_lpr.data.reading.loading import Batch, BatchIterator
from megatron_moe_lpr.data.reading.training_dataset import TrainingDataset
from megatron_moe_lpr.data.reading.validation_dataset import ValidationDataset
from megatron_moe_lpr.errors import UserError

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "language")
"""Keys of a `Batch`. All tensors are [batch, sequence]; `loss_mask` is float32, the others int64. Where documents are
kept apart there are `documents.DOCUMENT` and `documents.BOUNDARIES` too."""


def build_data_iterator(
    dataset: TrainingDataset,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield the micro-batches of one data-parallel rank, starting at sample `consumed_samples` of the run.

    Of each `micro_batch_size * data_parallel_size` consecutive samples rank r gets the r-th part. So a global batch
    holds the same samples for every layout, and `consumed_samples` alone is the position in the data. All ranks of a
    tensor- or pipeline-parallel group pass the same arguments and get equal batches. Incomplete micro-batches at the
    end of the dataset are dropped.

    Args:
        dataset: from `build_training_dataset`.
        consumed_samples: samples used so far, summed over all ranks.
        micro_batch_size: samples per micro-batch.
        data_parallel_rank: from 0.
        data_parallel_size: number of ranks.
        num_workers: loader processes that read ahead; 0: read in the calling process.
        pin_memory: put batches into page-locked memory, for asynchronous copies to a GPU.

    Raises:
        UserError: no samples are left.
    """
    step = micro_batch_size * data_parallel_size
    if consumed_samples + step > len(dataset):
        raise UserError(f"the data ends: {consumed_samples:,} of {len(dataset):,} samples are used; train for fewer")
    indices = rank_samples(len(dataset), consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
    return BatchIterator(dataset, indices, collate, num_workers, pin_memory)


def rank_samples(
    num_samples: int, consumed_samples: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> Sequence[list[int]]:
    """The numbers of the samples that one data-parallel rank reads, micro-batch by micro-batch, as
    `build_data_iterator` reads them from a dataset of `num_samples`; its arguments, and no dataset."""
    step = micro_batch_size * data_parallel_size
    rounds = range(consumed_samples, num_samples - step + 1, step)
    return _Indices(rounds, data_parallel_rank * micro_batch_size, micro_batch_size)


def build_validation_iterator(
    dataset: ValidationDataset,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    micro_batch_multiple: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield one rank's micro-batches of a validation dataset; over all ranks every sample occurs exactly once.

    Every rank gets `count_validation_micro_batches` micro-batches, padded with samples whose loss mask is 0, so sums of
    loss and loss mask are exact for every layout.
    """
    count = count_validation_micro_batches(dataset, micro_batch_size, data_parallel_size, micro_batch_multiple)
    step = micro_batch_size * data_parallel_size
    indices = _Indices(range(0, count * step, step), data_parallel_rank * micro_batch_size, micro_batch_size)
    return BatchIterator(dataset, indices, collate, num_workers, pin_memory)


def count_validation_micro_batches(
    dataset: ValidationDataset, micro_batch_size: int, data_parallel_size: int, micro_batch_multiple: int = 1
) -> int:
    """Return micro-batches per rank for one pass over the dataset, a multiple of `micro_batch_multiple`."""
    samples = micro_batch_size * data_parallel_size * micro_batch_multiple
    return -(-len(dataset) // samples) * micro_batch_multiple


class _Indices(Sequence):
    """Sequence of one rank's micro-batches as lists of sample indices, without storing them."""

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
    """Stack samples [sequence] to a batch [batch, sequence]; add the boundaries of documents where samples have any.

    The boundaries are found here, on the host: their number differs between batches, and finding them on a GPU would
    make the host wait."""
    keys = (*BATCH_KEYS, DOCUMENT) if DOCUMENT in samples[0] else BATCH_KEYS
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in keys}
    return batch | {BOUNDARIES: cumulative_lengths(batch[DOCUMENT])} if DOCUMENT in batch else batch
