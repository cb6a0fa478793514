"""Read and count the text of one language, with a number of worker processes and bounded memory."""

import contextlib
import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_moe_lpr.data.preparation.documents import KEPT, DocumentOptions
from megatron_moe_lpr.data.preparation.encoding import BlockTask, encode_blocks, worker_pool
from megatron_moe_lpr.data.preparation.sources import partition_slices, read_blocks
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.progress import ProgressReport
from megatron_moe_lpr.vocabulary.base_tokenizer import BaseTokenizer
from megatron_moe_lpr.vocabulary.block_counter import HELD_OUT_IN, BlockCounter, CountedBlock
from megatron_moe_lpr.vocabulary.pair_counts import PairCounts

HELD_OUT_BYTES = 4 << 20
"""Bytes of held-out text of a language that are kept to measure with."""
MAX_WORDS = 1 << 19
"""Different words of a language that are kept, the most frequent ones."""


@dataclasses.dataclass(frozen=True)
class LanguageFiles:
    """The input of one language."""

    language: str
    files: Sequence[str]
    guarded: bool


@dataclasses.dataclass
class LanguageText:
    """What was counted in the text of one language; attributes as those of `CountedBlock`.

    Attributes:
        held_out: texts of about `HELD_OUT_BYTES` together at most.
        forgotten: words rarer than so often may have been forgotten.
    """

    language: str
    guarded: bool
    words: Counter[str] = dataclasses.field(default_factory=Counter)
    pairs: PairCounts = dataclasses.field(default_factory=PairCounts)
    held_out_pairs: PairCounts = dataclasses.field(default_factory=PairCounts)
    characters: set[str] = dataclasses.field(default_factory=set)
    held_out: list[str] = dataclasses.field(default_factory=list)
    held_out_bytes: int = 0
    documents: int = 0
    text_bytes: int = 0
    forgotten: int = 0

    def add(self, block: CountedBlock) -> None:
        """Add the counts of a block. The result depends on the order of blocks, not on who counted them."""
        self.words.update(block.words)
        if len(self.words) > 2 * MAX_WORDS:
            self._forget_rare_words()
        self.pairs.add(*block.pairs)
        self.held_out_pairs.add(*block.held_out_pairs)
        self.characters |= block.characters
        self.documents += block.documents
        self.text_bytes += block.text_bytes
        for text in block.held_out:
            if self.held_out_bytes < HELD_OUT_BYTES:
                self.held_out.append(text)
                self.held_out_bytes += len(text.encode("utf-8"))

    def _forget_rare_words(self) -> None:
        # Words of equal count go together, so that the order of words decides nothing.
        counts = np.fromiter(self.words.values(), np.int64, len(self.words))
        limit = int(np.partition(counts, len(counts) - MAX_WORDS)[len(counts) - MAX_WORDS]) + 1
        self.words = Counter({word: count for word, count in self.words.items() if count >= limit})
        self.forgotten = max(self.forgotten, limit)


def count_text(
    source: LanguageFiles, base: BaseTokenizer, options: DocumentOptions, seed: int, workers: int
) -> LanguageText:
    """Count the text of one language; the result is the same for any number of workers.

    Raises:
        UserError: a file cannot be read, a line is no document, or the text is too short to hold some of it out.
    """
    text = LanguageText(source.language, source.guarded)
    counter = BlockCounter(base, dataclasses.replace(options, language=source.language), source.guarded, seed)
    skipped: Counter[str] = Counter()
    first: dict[str, str] = {}
    for block in each_block(source, counter, options, workers, f"counting {source.language}"):
        text.add(block)
        skipped.update(block.skipped)
        first = {**block.first_errors, **first}
    for reason, count in sorted((+skipped).items()):
        example = f" (first: {first[reason]})" if reason in first else ""
        action = "kept" if reason.startswith(KEPT) else "skipped"
        print(f"{source.language}: {action}: {count:,} {reason}{example}", file=sys.stderr)
    if not text.held_out or not text.text_bytes:
        flag = "--guard" if source.guarded else "--learn"
        raise UserError(
            f"{flag} {source.language}: the text is too short: one document in {HELD_OUT_IN} is held out to measure "
            f"with, and of {text.documents:,} documents {'none was' if text.documents else 'nothing was left'}; give "
            "more documents"
        )
    return text


def each_block(source: LanguageFiles, task: BlockTask, options: DocumentOptions, workers: int, name: str) -> Any:
    """Yield the result of `task` for each block of a language's files, in their order, with a progress report."""
    slices = partition_slices(source.files, 1, 1)
    blocks = (block for piece in slices for block in read_blocks(piece, [options.json_key], options.max_line_bytes))
    total = sum(piece.end - piece.start for piece in slices) or None
    with _silent_forks(), worker_pool(task, workers) as pool, ProgressReport(name, total) as progress:
        for result in encode_blocks(pool, blocks, workers):
            progress.advance(result.disk_bytes, {"documents": result.documents})
            yield result


@contextlib.contextmanager
def _silent_forks() -> Iterator[None]:
    """Keep the tokenizers library from a warning in each worker, which is forked after the library has used threads.

    The workers use none: `encoding.worker_pool` turns them off there.
    """
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        yield
        return
    os.environ[name] = "true"
    try:
        yield
    finally:
        del os.environ[name]
