"""`--data-path [weight] prefix ...`: the datasets of the training blend and their weights."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from megatron_moe_lpr.checkpoint.format.card import EarlierTokenizer
from megatron_moe_lpr.data.indexed import check_index, read_lengths
from megatron_moe_lpr.data.language_names import covered
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
        weight: fraction of the samples drawn from it; the entries sum to 1.
        tokens: tokens in these documents.
        is_packed: samples hold whole documents (best-fit), see `packing.py`.
    """

    prefix: str
    manifest: Manifest
    weight: float
    first_document: int
    end_document: int
    tokens: int
    is_packed: bool = False

    @property
    def language(self) -> str:
        """The language of the dataset."""
        return self.manifest.language


@dataclasses.dataclass(frozen=True)
class LanguageTokens:
    """Tokens of one language in a blend, and how many of them a run draws."""

    language: str
    is_original: bool
    fraction: float
    """Fraction of all samples (and tokens) of the run, 0 to 1."""
    tokens: int
    """Tokens of the language in the data."""
    tokens_drawn: float
    """Tokens drawn by the whole run (samples x sequence length)."""

    @property
    def epochs(self) -> float:
        """Passes over the data of this language."""
        return self.tokens_drawn / self.tokens


def parse_blend(arguments: Sequence[str], flag: str = "--data-path") -> list[tuple[float | None, str]]:
    """Parse `["30", "a", "70", "b"]` to [(30.0, "a"), (70.0, "b")]; weights are None if none is given.

    Raises:
        UserError: only some prefixes have weights, or a weight is not a positive number.
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
    earlier_tokenizers: Sequence[EarlierTokenizer] = (),
) -> list[BlendEntry]:
    """Read the manifests of a blend and check them against each other.

    Args:
        arguments: values of the flag. Without weights, datasets are drawn in proportion to their tokens.
        flag: name of the flag, for error messages.
        documents: (start, end) of the documents to use of each dataset, as fractions.
        tokenizer_fingerprint: fingerprint of the checkpoint's tokenizer, which the data must have; None: the datasets
            are only compared with each other.
        earlier_tokenizers: tokenizers from before vocabulary extensions of the checkpoint, with which datasets of the
            languages that they name may have been made.

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
            _check_tokenizer(prefix, manifest, tokenizer_fingerprint, earlier_tokenizers)
    check_agreement(manifests, ("tokenizer", "eod") if tokenizer_fingerprint is None else ("eod",))
    check_chat_templates(manifests)
    entries = [_entry(prefix, manifests[prefix], weight, documents, flag) for weight, prefix in pairs]
    total = sum(entry.weight for entry in entries)
    if not math.isfinite(total):
        raise UserError(f"{flag}: the weights add up to more than a number holds; give smaller ones")
    return [dataclasses.replace(entry, weight=entry.weight / total) for entry in entries]


def check_chat_templates(manifests: dict[str, Manifest]) -> None:
    """Raise UserError if two datasets of conversations were written with different chat templates; names both.

    Plain text goes with any of them, and so do pairs of texts, which no template has written.
    """
    written = {prefix: manifest for prefix, manifest in manifests.items() if manifest.chat_template}
    if written:
        check_agreement(written, ("chat_template",))


def _check_tokenizer(prefix: str, manifest: Manifest, fingerprint: str, earlier: Sequence[EarlierTokenizer]) -> None:
    """Refuse a dataset that has other token ids than the checkpoint's tokenizer gives its language."""
    known = [one for one in earlier if one.fingerprint == manifest.tokenizer]
    if not known or manifest.tokenizer == fingerprint:
        check_tokenizer(prefix, manifest, fingerprint, "the checkpoint's")
    elif not any(covered([manifest.language], one.unchanged) for one in known):
        raise UserError(
            f"{prefix}: was made with the tokenizer from before the vocabulary extension, which splits "
            f"{manifest.language} otherwise than the checkpoint's; preprocess again with that one"
        )


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
    if manifest.chat and not manifest.loss_tokens:
        raise UserError(f"{flag} {prefix}: no token of these conversations counts in the loss")
    return BlendEntry(prefix, manifest, float(tokens) if weight is None else weight, first, end, tokens)


def language_tokens(
    blend: Sequence[BlendEntry], original_languages: Sequence[str], train_tokens: float
) -> list[LanguageTokens]:
    """Return for each language, sorted, its fraction and tokens in a run of `train_tokens` tokens."""
    found = []
    for language in sorted({entry.language for entry in blend}):
        entries = [entry for entry in blend if entry.language == language]
        fraction = sum(entry.weight for entry in entries)
        tokens = sum(entry.tokens for entry in entries)
        drawn = fraction * train_tokens
        found.append(LanguageTokens(language, language in original_languages, fraction, tokens, drawn))
    return found


def parse_split(split: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Parse `99,1` to fractions of documents for training, (0, 0.99), and validation, (0.99, 1).

    A third number reserves a part of the documents for a test set, which is used by neither.
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
