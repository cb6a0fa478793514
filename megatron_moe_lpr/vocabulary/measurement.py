"""Bytes a token and tokens a word of held-out text, and guarded documents that get a new token."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe_lpr.data.preparation.documents import DocumentOptions, read_documents
from megatron_moe_lpr.data.preparation.encoding import text_batches
from megatron_moe_lpr.data.preparation.sources import Block
from megatron_moe_lpr.data.tokenizer_extension import GuardedLanguage
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.vocabulary.base_tokenizer import BaseTokenizer, rust_tokenizer
from megatron_moe_lpr.vocabulary.corpus import LanguageFiles, LanguageText, each_block
from megatron_moe_lpr.vocabulary.extended_content import expand

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

LONGEST_WORD = 25
"""Characters of an average word, by white space, from which a language counts as written without spaces."""


@dataclasses.dataclass(frozen=True)
class Fertility:
    """How a tokenizer splits a text."""

    bytes_per_token: float
    tokens_per_word: float | None
    """Words by white space; None for a language that is written without spaces."""


def measure(tokenizer: "RustTokenizer", texts: Sequence[str]) -> Fertility:
    """Return the fertility of a tokenizer on texts."""
    tokens = sum(len(ids) for ids in encode(tokenizer, texts))
    words = sum(len(text.split()) for text in texts)
    has_spaces = sum(map(len, texts)) <= LONGEST_WORD * words
    size = sum(len(text.encode("utf-8")) for text in texts)
    return Fertility(size / max(tokens, 1), tokens / words if has_spaces and words else None)


def encode(tokenizer: "RustTokenizer", texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, without tokens around it."""
    batches = text_batches(list(texts))
    return [one.ids for batch in batches for one in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]


def check_old_splits(
    base: BaseTokenizer, extended: "RustTokenizer", pieces: list[list[int]], text: LanguageText
) -> int:
    """Check on held-out text that new tokens stand for exactly the base's ids; return how many documents have one.

    Raises:
        UserError: the extended tokenizer splits a text otherwise where there is no new token.
    """
    changed = 0
    before = encode(base.rust(), text.held_out)
    for old, new in zip(before, encode(extended, text.held_out), strict=True):
        if old == new:
            continue
        changed += 1
        if expand(new, pieces, base.rows) != old:
            raise UserError(
                f"{base.path}: cannot be extended: it splits text of {text.language} otherwise by itself when merges "
                "are added"
            )
    return changed


@dataclasses.dataclass(frozen=True)
class CheckedBlock:
    """How many documents a block has, and how many of them get a new token."""

    documents: int
    changed: int
    disk_bytes: int


class GuardCheck:
    """Counts documents with a new token, block by block (a `BlockTask`)."""

    def __init__(self, content: dict[str, Any], path: Path, rows: int, options: DocumentOptions) -> None:
        self.tokenizer, self.rows, self.options = rust_tokenizer(content, path), rows, options

    def encode(self, block: Block) -> CheckedBlock:
        """Return the counts of a block."""
        texts = [text for _, text in read_documents(block, self.options, Counter(), {})]
        changed = sum(max(ids, default=0) >= self.rows for ids in encode(self.tokenizer, texts))
        return CheckedBlock(len(texts), changed, block.disk_bytes)


def check_guarded(
    source: LanguageFiles, base: BaseTokenizer, content: dict[str, Any], options: DocumentOptions, workers: int
) -> GuardedLanguage:
    """Encode all documents of a guarded language again, and count those that get a new token."""
    options = dataclasses.replace(options, language=source.language)
    task = GuardCheck(content, base.path, base.rows, options)
    documents = changed = 0
    for block in each_block(source, task, options, workers, f"checking {source.language}"):
        documents, changed = documents + block.documents, changed + block.changed
    return GuardedLanguage(documents, changed)


def first_tokens(content: dict[str, Any], rows: int, number: int) -> dict[str, Any]:
    """Return an extended tokenizer.json with the first `number` new tokens only."""
    model = content["model"]
    vocabulary = {token: one for token, one in model["vocab"].items() if one < rows + number}
    # A token may have a second merge, of two parts that come later.
    merges = [pair for pair in model["merges"] if vocabulary.keys() >= {*pair, "".join(pair)}]
    return {**content, "model": {**model, "vocab": vocabulary, "merges": merges}}
