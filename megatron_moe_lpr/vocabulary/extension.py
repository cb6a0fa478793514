"""Extend a tokenizer: count text, learn merges, measure them and write the directory of the extended tokenizer."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_moe_lpr.data.preparation.documents import DocumentOptions
from megatron_moe_lpr.data.preparation.sources import check_beginning
from megatron_moe_lpr.data.tokenizer_extension import GuardedLanguage, TokenizerExtension
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.atomic_directory import atomic_directory
from megatron_moe_lpr.progress import ProgressReport
from megatron_moe_lpr.vocabulary.base_tokenizer import BaseTokenizer, read_base, rust_tokenizer
from megatron_moe_lpr.vocabulary.corpus import LanguageFiles, LanguageText, count_text
from megatron_moe_lpr.vocabulary.extended_content import check_content, extend_content
from megatron_moe_lpr.vocabulary.figures import ExtensionFigures, LanguageFigures
from megatron_moe_lpr.vocabulary.measurement import check_guarded, check_old_splits, first_tokens, measure
from megatron_moe_lpr.vocabulary.merge_learner import MergeLearner
from megatron_moe_lpr.vocabulary.new_characters import ByteRuns
from megatron_moe_lpr.vocabulary.sequences import MAX_IDS
from megatron_moe_lpr.vocabulary.weighting import weigh_words

MAX_STEPS = 8
"""Numbers of new tokens, at most, for which the gain is measured."""


@dataclasses.dataclass(frozen=True)
class ExtensionOptions:
    """An extension; fields as the flags of `moe-lpr extend-tokenizer`."""

    directory: Path
    sources: Sequence[LanguageFiles]
    new_tokens: int
    output: Path
    weights: Mapping[str, float]
    """Of a learned language; 1 for one that is not named."""
    guard_min_count: int = 1
    documents: DocumentOptions = dataclasses.field(default_factory=DocumentOptions)
    seed: int = 0
    workers: int = 1
    overwrite: bool = False


def extend_tokenizer(options: ExtensionOptions) -> ExtensionFigures:
    """Write the extended tokenizer to `options.output`.

    The result is the same for any number of workers. Memory is bounded: by `corpus.MAX_WORDS` words of each learned
    language, the different pairs of tokens in guarded text, and `corpus.HELD_OUT_BYTES` of each language.

    Raises:
        UserError: bad input; nothing is left behind.
    """
    base = read_base(options.directory)
    if base.rows + options.new_tokens > MAX_IDS:
        raise UserError(f"--new-tokens {options.new_tokens}: more than {MAX_IDS - base.rows:,} cannot be learned here")
    for source in options.sources:
        for name in source.files:
            check_beginning(name, [options.documents.json_key])
    with atomic_directory(options.output, options.overwrite) as directory:
        texts = [count_text(one, base, options.documents, options.seed, options.workers) for one in options.sources]
        learner, changed = learn_tokens(base, texts, options)
        content = extend_content(base, learner.tokens, learner.merges)
        check_content(base, content, learner.tokens, learner.pieces)
        figures = measure_extension(base, content, learner, texts, changed)
        guarded = {
            one.language: check_guarded(one, base, content, options.documents, options.workers)
            for one in options.sources
            if one.guarded
        }
        # Imports torch, which takes seconds; the workers are forked before.
        from megatron_moe_lpr.vocabulary.directory import write_directory

        fingerprint = write_directory(options.directory, content, figures, directory)
        _record(base, learner, guarded, fingerprint).write(directory)
    print_guarded(guarded)
    return figures


def learn_tokens(
    base: BaseTokenizer, texts: Sequence[LanguageText], options: ExtensionOptions
) -> tuple[MergeLearner, dict[str, int]]:
    """Learn the new tokens.

    Returns:
        The learner, and for each guarded language how many held-out documents got a new token before these documents
        were guarded too: an estimate for text that nobody guarded.

    Raises:
        UserError: the text does not give so many tokens.
    """
    guarded = [text for text in texts if text.guarded]
    words, counts, min_count = weigh_words([text for text in texts if not text.guarded], options.weights)
    runs = ByteRuns(base)
    characters = runs.choose(
        words, counts, set().union(*(text.characters for text in guarded)), options.new_tokens // 2
    )
    forbidden = [text.pairs.at_least(options.guard_min_count) for text in guarded]
    forbidden_keys = np.unique(np.concatenate([np.empty(0, np.int64), *forbidden]))
    learner = MergeLearner(base, runs.replace(words, list(characters)), counts, forbidden_keys, characters, min_count)
    with ProgressReport("learning merges", options.new_tokens) as progress:
        learner.learn(options.new_tokens, progress.advance)
    content = extend_content(base, learner.tokens, learner.merges)
    extended = rust_tokenizer(content, base.path)
    changed = {text.language: check_old_splits(base, extended, learner.pieces, text) for text in guarded}
    if held_out := [text.held_out_pairs.at_least(options.guard_min_count) for text in guarded]:
        learner.forbid(np.unique(np.concatenate(held_out)))
        learner.learn(options.new_tokens, lambda _: None)
    if len(learner.tokens) < options.new_tokens:
        raise UserError(
            f"--new-tokens {options.new_tokens:,}: the text of the learned languages gives only "
            f"{len(learner.tokens):,} tokens that no guarded text has; give more text, or pass a smaller number"
        )
    return learner, changed


def measure_extension(
    base: BaseTokenizer,
    content: dict,
    learner: MergeLearner,
    texts: Sequence[LanguageText],
    changed: Mapping[str, int],
) -> ExtensionFigures:
    """Measure the extended tokenizer on the held-out text of each language."""
    old, new = base.rust(), rust_tokenizer(content, base.path)
    languages = {}
    for text in texts:
        if not text.guarded:
            check_old_splits(base, new, learner.pieces, text)
        languages[text.language] = LanguageFigures(
            text.guarded,
            measure(old, text.held_out),
            measure(new, text.held_out),
            len(text.held_out),
            changed.get(text.language, 0),
        )
    steps = {}
    for number in step_numbers(len(learner.tokens)):
        first = rust_tokenizer(first_tokens(content, base.rows, number), base.path)
        steps[number] = {
            text.language: measure(first, text.held_out).bytes_per_token for text in texts if not text.guarded
        }
    return ExtensionFigures(languages, steps)


def step_numbers(tokens: int) -> list[int]:
    """Return 1,000, 2,000, ... up to `tokens`: larger steps above `MAX_STEPS` thousand, quarters below 2,000."""
    size = max(1, tokens // 4) if tokens < 2000 else 1000 * -(-tokens // (1000 * MAX_STEPS))
    return [*range(size, tokens, size), tokens]


def print_guarded(guarded: Mapping[str, GuardedLanguage]) -> None:
    """Print to standard error how many guarded documents get a new token."""
    for language, one in guarded.items():
        share = one.changed / max(one.documents, 1)
        print(
            f"{language}: {one.changed:,} of {one.documents:,} guarded documents change ({share:.2%})", file=sys.stderr
        )


def _record(
    base: BaseTokenizer, learner: MergeLearner, guarded: Mapping[str, GuardedLanguage], fingerprint: str
) -> TokenizerExtension:
    return TokenizerExtension(
        base_vocab_size=base.rows,
        new_tokens=len(learner.tokens),
        base_tokenizer_fingerprint=base.fingerprint,
        tokenizer_fingerprint=fingerprint,
        guarded=dict(guarded),
        pieces=learner.pieces,
        earlier=base.earlier,
    )
