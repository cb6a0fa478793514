"""The datasets of a run: training blend and validation sets."""

import dataclasses
from collections.abc import Sequence

import torch

from megatron_moe_lpr.data.reading.config import DataConfig, DataSources
from megatron_moe_lpr.data.reading.training_dataset import TrainingDataset, build_training_dataset
from megatron_moe_lpr.data.reading.validation_dataset import ValidationDataset


@dataclasses.dataclass(frozen=True)
class Datasets:
    """What a run trains on and is evaluated on."""

    train: TrainingDataset
    valid: list[ValidationDataset]
    """One for each validation dataset, in the order given."""


def build_datasets(
    sources: DataSources,
    config: DataConfig,
    sequence_length: int,
    train_samples: int | Sequence[int],
    valid_samples: int | None = None,
) -> Datasets:
    """Build both; call it on every rank, or in one process without torch.distributed. See `build_training_dataset`.

    Args:
        train_samples: of the run; several numbers, growing: of a run that was lengthened. The order of the samples
            depends on their number, so those of the shorter run stay as they were, and what was added is a dataset of
            its own behind them, in the order of the next seed.
        valid_samples: of each validation dataset, from its first on; None: all.
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
    """The validation sets alone; no index map is needed. `max_samples`: of each, from its first on; 0: no sets."""
    return [
        ValidationDataset(
            entry, sources.languages.id(entry.language), sequence_length, sources.eod, config.eod_mask_loss, max_samples
        )
        for entry in (sources.valid if max_samples != 0 else [])
    ]
