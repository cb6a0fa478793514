"""Build the training blend and the validation datasets of a run."""

import dataclasses
from collections.abc import Sequence

import torch

from megatron_moe_lpr.data.reading.config import DataConfig, DataSources
from megatron_moe_lpr.data.reading.training_dataset import TrainingDataset, build_training_dataset
from megatron_moe_lpr.data.reading.validation_dataset import (
    ValidationDataset,
    open_validation_dataset,
)


@dataclasses.dataclass(frozen=True)
class Datasets:
    """Training blend and validation datasets of a run."""

    train: TrainingDataset
    valid: list[ValidationDataset]
    """Validation datasets, in the order given."""


def build_datasets(
    sources: DataSources,
    config: DataConfig,
    sequence_length: int,
    train_samples: int | Sequence[int],
    valid_samples: int | None = None,
) -> Datasets:
    """Build training and validation datasets; all ranks call it together. See `build_training_dataset`.

    Args:
        train_samples: samples of the run; several increasing numbers for a run that was lengthened. The order of
            samples depends on their number, so the samples added by each lengthening form a dataset of their own,
            appended to the previous ones and shuffled by the next seed.
        valid_samples: first samples to use of each validation dataset; None: all.
    """
    valid = build_validation_datasets(sources, config, sequence_length, valid_samples)
    ends = [train_samples] if isinstance(train_samples, int) else list(train_samples)
    parts = [
        build_training_dataset(
            sources, dataclasses.replace(config, seed=(config.seed + part) % 2**32), sequence_length, end - begin
        )
        for part, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    return Datasets(parts[0] if len(parts) == 1 else torch.utils.data.ConcatDataset(parts), valid)


def build_validation_datasets(
    sources: DataSources, config: DataConfig, sequence_length: int, max_samples: int | None = None
) -> list[ValidationDataset]:
    """Build the validation datasets alone. `max_samples`: first samples to use of each; 0: no datasets."""
    return [
        open_validation_dataset(
            entry,
            sources.languages.id(entry.language),
            sequence_length,
            sources.eod,
            config.eod_mask_loss,
            max_samples,
            config.documents,
        )
        for entry in (sources.valid if max_samples != 0 else [])
    ]
