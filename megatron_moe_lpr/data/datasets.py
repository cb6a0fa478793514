"""The datasets of a run: training blend and validation sets."""

import dataclasses

from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_moe_lpr.data.config import DataConfig, DataSources
from megatron_moe_lpr.data.training_dataset import build_training_dataset
from megatron_moe_lpr.data.validation_dataset import ValidationDataset


@dataclasses.dataclass(frozen=True)
class Datasets:
    """What a run trains on and is evaluated on."""

    train: BlendedDataset
    valid: list[ValidationDataset]
    """One for each validation dataset, in the order given."""


def build_datasets(sources: DataSources, config: DataConfig, sequence_length: int, train_samples: int) -> Datasets:
    """Build both; call it on every rank, or in one process without torch.distributed. See `build_training_dataset`."""
    valid = build_validation_datasets(sources, config, sequence_length)
    return Datasets(build_training_dataset(sources, config, sequence_length, train_samples), valid)


def build_validation_datasets(
    sources: DataSources, config: DataConfig, sequence_length: int
) -> list[ValidationDataset]:
    """The validation sets alone; no index map is needed."""
    return [
        ValidationDataset(
            entry, sources.languages.id(entry.language), sequence_length, sources.eod, config.eod_mask_loss
        )
        for entry in sources.valid
    ]
