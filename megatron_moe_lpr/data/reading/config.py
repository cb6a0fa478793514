"""The data's flags, and what they amount to before any index is built."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from megatron_moe_lpr.data.language_names import covered
from megatron_moe_lpr.data.original_languages import read_original_languages
from megatron_moe_lpr.data.reading.blend import (
    BlendEntry,
    LanguageShare,
    language_shares,
    parse_blend,
    parse_split,
    read_blend,
)
from megatron_moe_lpr.data.reading.languages import LanguageRegistry
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Acceptable, Decides, Free, RecordedAs
from megatron_moe_lpr.flag_ranges import Range, Seed


@dataclasses.dataclass
class DataConfig:
    """Where the text is and how it becomes batches."""

    data_path: Annotated[list[str], RecordedAs("data", acceptable=True)] = dataclasses.field(default_factory=list)
    """Training datasets: prefixes, or `weight prefix` pairs. No weights: in proportion to their tokens."""
    valid_data_path: Annotated[list[str], Free("validation changes no weight")] = dataclasses.field(
        default_factory=list
    )
    """Validation datasets: prefixes, each evaluated by itself, whole and in order."""
    split: Annotated[str | None, RecordedAs("data", acceptable=True)] = None
    """Parts of each dataset's documents for training and validation, e.g. 99,1 (or pass --valid-data-path)."""
    data_cache_path: Annotated[str | None, Free("a place")] = None
    """Directory for index maps, seen by all nodes. Default: index-cache beside the first dataset."""
    original_languages: Annotated[list[str], RecordedAs("original_languages")] = dataclasses.field(default_factory=list)
    """All languages that the dense model already knows, by code or name. The checkpoint's history adds its own."""
    eod_mask_loss: Acceptable[bool] = False
    """Do not train on predicting the token after an end of document."""
    num_workers: Annotated[int, Range(0, 256), Free("who loads, not what")] = 2
    """Data loader processes on each rank; 0: load in the training process."""
    seed: Decides[Seed] = 1234
    """Decides the order of the samples."""


@dataclasses.dataclass(frozen=True)
class DataSources:
    """The datasets of a run, checked; the same on every rank."""

    train: list[BlendEntry]
    valid: list[BlendEntry]
    languages: LanguageRegistry
    original_languages: tuple[str, ...]
    """All that the dense model knows, whatever data there is."""
    notes: tuple[str, ...] = ()
    """What the user should know of how languages were understood."""

    @property
    def eod(self) -> int:
        """The id that ends a document."""
        return self.train[0].manifest.eod

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the one tokenizer that made all datasets."""
        return self.train[0].manifest.tokenizer

    def shares(self, train_tokens: float) -> list[LanguageShare]:
        """Per language: share of the samples, tokens in the data, tokens that a run of `train_tokens` draws."""
        return language_shares(self.train, sorted(self.trained_original), train_tokens)

    @property
    def replay_share(self) -> float:
        """Share of the samples that are of original languages, 0 to 1."""
        return sum(entry.weight for entry in self.train if entry.language in self.trained_original)

    @property
    def trained_original(self) -> set[str]:
        """Original languages of the training data, as the datasets name them."""
        return covered({entry.language for entry in self.train}, self.original_languages)


def read_data_sources(
    config: DataConfig, tokenizer_fingerprint: str | None = None, recorded_original: Collection[str] = ()
) -> DataSources:
    """Read and check the manifests behind the flags. Cheap: no index map is built.

    Args:
        config: the flags.
        tokenizer_fingerprint: of the checkpoint's tokenizer; a dataset made with another is refused.
        recorded_original: original languages in the checkpoint's history.

    Raises:
        UserError: see `blend.read_blend`; or a misspelled language in `--original-languages`.
    """
    if not config.data_path:
        raise UserError("--data-path: give the datasets to train on")
    if config.split and config.valid_data_path:
        raise UserError("--split and --valid-data-path: give one of them")
    train_part, valid_part = parse_split(config.split or "1,0")
    train = read_blend(config.data_path, "--data-path", train_part, tokenizer_fingerprint)
    expected = train[0].manifest.tokenizer
    valid: list[BlendEntry] = []
    if config.valid_data_path:
        valid = read_blend(config.valid_data_path, "--valid-data-path", tokenizer_fingerprint=expected)
    elif valid_part[1] > valid_part[0]:
        valid = read_blend(config.data_path, "--data-path", valid_part)
    languages = LanguageRegistry(entry.language for entry in (*train, *valid))
    return with_original(DataSources(train, valid, languages, ()), config, recorded_original)


def with_original(sources: DataSources, config: DataConfig, recorded: Collection[str]) -> DataSources:
    """The sources with the original languages that the flag and a checkpoint's history name, and the notes on them.

    Raises:
        UserError: a misspelled language in `--original-languages`.
    """
    original = read_original_languages(config.original_languages, sources.languages.names, recorded)
    return dataclasses.replace(sources, original_languages=original.names, notes=original.notes)


def cache_directory(config: DataConfig) -> Path:
    """Where the index maps go."""
    if config.data_cache_path:
        return Path(config.data_cache_path)
    return Path(parse_blend(config.data_path)[0][1]).parent / "index-cache"
