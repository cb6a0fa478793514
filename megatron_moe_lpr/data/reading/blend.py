"""`--data-path [weight] prefix ...`: which datasets make up the training data, and in what shares."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from megatron_moe_lpr.data.indexed import check_index, read_lengths
from megatron_moe_lpr.data.manifest import (
    Manifest,
    check_agreement,
    check_tokenizer,
    read_manifest,
    strip_suffix,
    verify_index,
)
from megatron_moe_lpr.errors import UserError


@dataclasses.dataclass(frozen=True)
class BlendEntry:
    """Documents [first_document, end_document) of one dataset.

    Attributes:
        prefix: the dataset.
        manifest: its manifest.
        weight: share of the samples drawn from it, 1 for all entries together.
        tokens: in these documents.
    """

    prefix: str
    manifest: Manifest
    weight: float
    first_document: int
    end_document: int
    tokens: int

    @property
    def language(self) -> str:
        """Its one language."""
        return self.manifest.language


@dataclasses.dataclass(frozen=True)
class LanguageShare:
    """What a blend holds of one language and what a run draws of it."""

    language: str
    is_original: bool
    share: float
    """Of all samples, and so of all tokens, 0 to 1."""
    tokens: int
    """In the data."""
    tokens_drawn: float
    """By the whole run (samples times sequence length)."""

    @property
    def epochs(self) -> float:
        """How often the run sees the data."""
        return self.tokens_drawn / self.tokens


def parse_blend(arguments: Sequence[str], flag: str = "--data-path") -> list[tuple[float | None, str]]:
    """`["30", "a", "70", "b"]` to [(30.0, "a"), (70.0, "b")]; weights are None where none is given.

    Raises:
        UserError: weights for some prefixes only, or one that is not a positive number.
    """
    numbers = [_number(argument) for argument in arguments]
    if all(number is None for number in numbers):
        return [(None, strip_suffix(argument)) for argument in arguments]
    if len(arguments) % 2:
        raise UserError(f"{flag}: {len(arguments)} arguments; give either prefixes only or `weight prefix` pairs")
    pairs = list(zip(arguments[::2], numbers[::2], arguments[1::2], strict=True))
    for text, weight, prefix in pairs:
        if weight is None:
            raise UserError(f"{flag}: weight {text!r} (of {prefix}) is not a number; write `weight prefix` pairs")
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"{flag}: weight {text} (of {prefix}) must be above 0; leave the dataset out instead")
    return [(weight, strip_suffix(prefix)) for _, weight, prefix in pairs]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def read_blend(
    arguments: Sequence[str],
    flag: str = "--data-path",
    documents: tuple[float, float] = (0.0, 1.0),
    tokenizer_fingerprint: str | None = None,
) -> list[BlendEntry]:
    """Read the manifests of a blend and check them against each other.

    Args:
        arguments: as on the command line. Without weights, datasets are drawn in proportion to their tokens.
        flag: its name, for messages.
        documents: the part of each dataset to use, as fractions.
        tokenizer_fingerprint: of the checkpoint's tokenizer, which must be the data's; None: do not compare.

    Raises:
        UserError: bad weights, a missing or damaged dataset, an empty part, or two tokenizers.
    """
    pairs = parse_blend(arguments, flag)
    prefixes = [prefix for _, prefix in pairs]
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise UserError(f"{flag}: {prefix} is given twice; give it once with the summed weight")
    manifests = {prefix: read_manifest(prefix) for prefix in prefixes}
    if tokenizer_fingerprint is not None:
        for prefix, manifest in manifests.items():
            check_tokenizer(prefix, manifest, tokenizer_fingerprint, "the checkpoint's")
    check_agreement(manifests, ("tokenizer", "eod"))
    entries = [_entry(prefix, manifests[prefix], weight, documents, flag) for weight, prefix in pairs]
    total = sum(entry.weight for entry in entries)
    if not math.isfinite(total):
        raise UserError(f"{flag}: the weights add up to more than a number holds; give smaller ones")
    return [dataclasses.replace(entry, weight=entry.weight / total) for entry in entries]


def _entry(
    prefix: str, manifest: Manifest, weight: float | None, documents: tuple[float, float], flag: str
) -> BlendEntry:
    verify_index(prefix, manifest)
    lengths = read_lengths(prefix)
    if len(lengths) != manifest.documents:
        raise UserError(f"{prefix}.idx: {len(lengths):,} documents, but {manifest.documents:,} in {prefix}.json")
    check_index(prefix, manifest.dtype, manifest.tokens)
    first, end = (round(fraction * len(lengths)) for fraction in documents)
    whole = (first, end) == (0, len(lengths))
    tokens = manifest.tokens if whole else int(np.sum(lengths[first:end], dtype=np.int64))
    if tokens < 2:
        part = "" if whole else f" in documents {first:,} to {end:,} of {len(lengths):,}, which --split gives it"
        raise UserError(f"{flag} {prefix}: no text{part}")
    return BlendEntry(prefix, manifest, float(tokens) if weight is None else weight, first, end, tokens)


def language_shares(
    blend: Sequence[BlendEntry], original_languages: Sequence[str], train_tokens: float
) -> list[LanguageShare]:
    """What a run of `train_tokens` tokens draws of each language, sorted by language."""
    shares = []
    for language in sorted({entry.language for entry in blend}):
        entries = [entry for entry in blend if entry.language == language]
        share = sum(entry.weight for entry in entries)
        tokens = sum(entry.tokens for entry in entries)
        shares.append(LanguageShare(language, language in original_languages, share, tokens, share * train_tokens))
    return shares


def parse_split(split: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """`99,1` to the fractions of the documents for training, (0, 0.99), and validation, (0.99, 1).

    A third number, for a test set, takes its part of the documents out of both.
    """
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    parts += [0.0] * (3 - len(parts))
    if len(parts) != 3 or not all(math.isfinite(part) and part >= 0 for part in parts) or parts[0] <= 0:
        raise UserError(f"--split {split}: write the parts for training and validation, for example 99,1")
    train, valid = parts[0] / sum(parts), (parts[0] + parts[1]) / sum(parts)
    return (0.0, train), (train, valid)
