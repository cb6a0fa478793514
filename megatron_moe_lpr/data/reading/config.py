"""Flags of the training data, and the datasets they name, checked before any index is built."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

from megatron_moe_lpr.checkpoint.format.card import EarlierTokenizer
from megatron_moe_lpr.data.language_names import covered
from megatron_moe_lpr.data.original_languages import read_original_languages
from megatron_moe_lpr.data.reading.blend import (
    BlendEntry,
    LanguageTokens,
    check_chat_templates,
    language_tokens,
    parse_blend,
    parse_split,
    read_blend,
)
from megatron_moe_lpr.data.reading.document_options import DocumentOptions
from megatron_moe_lpr.data.reading.languages import LanguageRegistry
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Acceptable, Decides, Free, RecordedAs
from megatron_moe_lpr.flag_ranges import Range, Seed


@dataclasses.dataclass
class DataConfig:
    """Training and validation data of a run."""

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
    documents: DocumentOptions = dataclasses.field(default_factory=DocumentOptions)
    num_workers: Annotated[int, Range(0, 256), Free("who loads, not what")] = 2
    """Data loader processes on each rank; 0: load in the training process."""
    seed: Decides[Seed] = 1234
    """Random seed of the order of the samples."""


@dataclasses.dataclass(frozen=True)
class DataSources:
    """The datasets of a run, checked; the same on every rank."""

    train: list[BlendEntry]
    valid: list[BlendEntry]
    languages: LanguageRegistry
    original_languages: tuple[str, ...]
    """Languages that the dense model knows, whether or not the run has data of them."""
    notes: tuple[str, ...] = ()
    """Messages about how language names were interpreted."""

    @property
    def is_packed(self) -> bool:
        """Whether any of the training data is packed best-fit."""
        return any(entry.is_packed for entry in self.train)

    @property
    def eod(self) -> int:
        """Token id that ends a document."""
        return self.train[0].manifest.eod

    def tokens_by_language(self, train_tokens: float) -> list[LanguageTokens]:
        """Return per language: fraction of the samples, tokens in the data, tokens drawn by `train_tokens` tokens."""
        return language_tokens(self.train, sorted(self.trained_original), train_tokens)

    @property
    def trained_original(self) -> set[str]:
        """Languages of the training data that are original, as the datasets name them."""
        return covered({entry.language for entry in self.train}, self.original_languages)


def read_data_sources(
    config: DataConfig,
    tokenizer_fingerprint: str | None = None,
    recorded_original: Collection[str] = (),
    earlier_tokenizers: Sequence[EarlierTokenizer] = (),
) -> DataSources:
    """Read and check the manifests of all datasets. Cheap: builds no index map.

    Args:
        config: the flags.
        tokenizer_fingerprint: fingerprint of the checkpoint's tokenizer; datasets made with another are refused.
        recorded_original: original languages that the checkpoint's history records.
        earlier_tokenizers: tokenizers from before its vocabulary extensions, see `blend.read_blend`.

    Raises:
        UserError: see `blend.read_blend`; or `--original-languages` has a misspelled language; or flags contradict
            each other.
    """
    if not config.data_path:
        raise UserError("--data-path: give the datasets to train on")
    config.documents.check()
    if config.split and config.valid_data_path:
        raise UserError("--split and --valid-data-path: give one of them")
    train_part, valid_part = parse_split(config.split or "1,0")
    train = read_blend(config.data_path, "--data-path", train_part, tokenizer_fingerprint, earlier_tokenizers)
    expected = tokenizer_fingerprint or train[0].manifest.tokenizer
    valid: list[BlendEntry] = []
    if config.valid_data_path:
        valid = read_blend(config.valid_data_path, "--valid-data-path", (0, 1), expected, earlier_tokenizers)
    elif valid_part[1] > valid_part[0]:
        valid = read_blend(config.data_path, "--data-path", valid_part, expected, earlier_tokenizers)
    train, valid = packed(train, config.documents), packed(valid, config.documents)
    check_chat_templates({entry.prefix: entry.manifest for entry in (*train, *valid)})
    languages = LanguageRegistry(entry.language for entry in (*train, *valid))
    return with_original(DataSources(train, valid, languages, ()), config, recorded_original)


def packed(entries: Sequence[BlendEntry], options: DocumentOptions) -> list[BlendEntry]:
    """Return datasets marked as packed best-fit or not."""
    return [dataclasses.replace(entry, is_packed=options.packs(entry.manifest.chat)) for entry in entries]


def with_original(sources: DataSources, config: DataConfig, recorded: Collection[str]) -> DataSources:
    """Return the sources with the original languages of the flag and of the checkpoint's history filled in.

    Raises:
        UserError: `--original-languages` has a misspelled language.
    """
    original = read_original_languages(config.original_languages, sources.languages.names, recorded)
    return dataclasses.replace(sources, original_languages=original.names, notes=original.notes)


def cache_directory(config: DataConfig) -> Path:
    """Return the directory of the index maps."""
    if config.data_cache_path:
        return Path(config.data_cache_path)
    return Path(parse_blend(config.data_path)[0][1]).parent / "index-cache"
