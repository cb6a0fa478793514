"""Count words of token ids and pairs of adjacent ids in a block of text, in worker processes."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import xxhash

from megatron_moe_lpr.data.preparation.documents import DocumentOptions, read_documents
from megatron_moe_lpr.data.preparation.encoding import text_batches
from megatron_moe_lpr.data.preparation.sources import Block
from megatron_moe_lpr.vocabulary.base_tokenizer import BaseTokenizer
from megatron_moe_lpr.vocabulary.sequences import WORD_END, insert_before, pair_keys, write_ids
from megatron_moe_lpr.vocabulary.token_classes import TokenClasses

HELD_OUT_IN = 16
"""One document in so many is held out."""

KeysAndCounts = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class CountedBlock:
    """Counts of one block.

    Attributes:
        words: of a learned language, words of two or more ids (`sequences.write_ids`) with their counts.
        pairs: of a guarded language, pairs of adjacent ids within a word, and their counts.
        held_out_pairs: the same for the held-out documents.
        characters: of a guarded language, all characters, if unknown ones become byte tokens.
        held_out: texts of the held-out documents, which the other attributes do not cover.
        documents: number of all documents.
        text_bytes: UTF-8 bytes of the documents that are not held out.
        skipped: documents left out or repaired, by reason.
        first_errors: `file:line: message` of the first one of each kind.
        disk_bytes: bytes read on disk.
    """

    words: Counter[str]
    pairs: KeysAndCounts
    held_out_pairs: KeysAndCounts
    characters: set[str]
    held_out: list[str]
    documents: int
    text_bytes: int
    skipped: Counter[str]
    first_errors: dict[str, str]
    disk_bytes: int


class BlockCounter:
    """Counts blocks of one language (a `BlockTask`).

    Args:
        base: the tokenizer.
        options: how to read a line.
        guarded: count pairs, which no merge may join; otherwise words to learn from.
        seed: chooses which documents are held out.
    """

    def __init__(self, base: BaseTokenizer, options: DocumentOptions, guarded: bool, seed: int) -> None:
        self.tokenizer, self.options, self.guarded, self.seed = base.rust(), options, guarded, seed
        self.byte_fallback = base.byte_fallback
        self.classes = TokenClasses(base.texts, base.byte_ids) if base.byte_fallback else None

    def encode(self, block: Block) -> CountedBlock:
        """Return the counts of a block. Raises UserError for a bad line if `stop_on_error` is set."""
        skipped: Counter[str] = Counter()
        first: dict[str, str] = {}
        texts = [text for _, text in read_documents(block, self.options, skipped, first)]
        held_out = [text for text in texts if self._is_held_out(text)]
        kept = [text for text in texts if not self._is_held_out(text)]
        return CountedBlock(
            words=Counter() if self.guarded else self._words(kept),
            pairs=self._pairs(kept if self.guarded else []),
            held_out_pairs=self._pairs(held_out if self.guarded else []),
            characters=self._characters(texts),
            held_out=held_out,
            documents=len(texts),
            text_bytes=sum(len(text.encode("utf-8")) for text in kept),
            skipped=skipped,
            first_errors=first,
            disk_bytes=block.disk_bytes,
        )

    def _is_held_out(self, text: str) -> bool:
        # By content: equal documents stay on one side, whatever file and block they are in.
        return xxhash.xxh3_64_intdigest(text.encode("utf-8"), seed=self.seed) % HELD_OUT_IN == 0

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts [tokens], and whether a pre-token starts with each [tokens]."""
        ids, starts = [np.empty(0, np.int64)], [np.empty(0, bool)]
        for batch in text_batches(list(texts)):
            for encoding in self.tokenizer.encode_batch(batch, add_special_tokens=False):
                ids.append(np.array(encoding.ids, np.int64))
                words = np.array([-1, *encoding.word_ids], np.int64)
                starts.append(words[1:] != words[:-1])
        return np.concatenate(ids), np.concatenate(starts)

    def _words(self, texts: Sequence[str]) -> Counter[str]:
        ids, starts = self._encode(texts)
        if self.classes is not None:
            starts |= self.classes.word_starts(ids)
        words = write_ids(insert_before(ids, starts, WORD_END)).split("\n")
        return Counter(word for word in words if len(word) > 1)

    def _pairs(self, texts: Sequence[str]) -> KeysAndCounts:
        ids, starts = self._encode(texts)
        keys, counts = np.unique(pair_keys(ids[:-1], ids[1:])[~starts[1:]], return_counts=True)
        return keys, counts

    def _characters(self, texts: Sequence[str]) -> set[str]:
        if not (self.guarded and self.byte_fallback):
            return set()
        characters = set().union(*texts)
        # The normalizer may write a character as others.
        normalizer = self.tokenizer.normalizer
        return characters | set().union(*map(normalizer.normalize_str, characters)) if normalizer else characters
