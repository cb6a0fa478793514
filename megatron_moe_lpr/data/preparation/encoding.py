"""Tokenize blocks of lines in worker processes, keeping their order.

Processes instead of the tokenizer's own threads: parsing JSON and copying ids out of the tokenizer's results hold
Python's global lock, so only processes run them in parallel (measured in docs/data.md).
"""

import array
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

import numpy as np

from megatron_moe_lpr.data.preparation.documents import KEPT, DocumentOptions, read_documents
from megatron_moe_lpr.data.preparation.sources import Block
from megatron_moe_lpr.data.special_tokens import SpecialTokenSearch
from megatron_moe_lpr.data.tokenizer import Tokenizer
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.processes import end_with_parent

BLOCKS_AHEAD = 2
BATCH_CHARACTERS = 1 << 17
NO_TOKENS = "no_tokens"
MENTIONS_AS_TEXT = f"{KEPT}special_tokens_as_text"
MENTIONS_AS_TOKENS = f"{KEPT}special_tokens_as_tokens"
EOD_INSIDE = f"{KEPT}end_of_document_inside"


@dataclasses.dataclass(frozen=True)
class EncoderOptions:
    """Settings of tokenization, sent to each worker process."""

    tokenizer: str
    eod_token: str | None
    append_eod: bool
    documents: DocumentOptions
    split_special_tokens: bool = True
    """Encode special tokens that occur in a text as plain text; otherwise as special tokens. Both are counted."""
    model_vocabulary: int | None = None
    """Vocabulary size of the model, if known; larger ids are refused."""
    chat: bool = False
    """Documents are conversations, see `chat_encoding.ChatEncoder`."""
    chat_template: str | None = None
    """File with the chat template; None: the tokenizer's own."""

    @property
    def mention_reason(self) -> str:
        """The count of documents that mention a special token."""
        return MENTIONS_AS_TEXT if self.split_special_tokens else MENTIONS_AS_TOKENS


@dataclasses.dataclass(frozen=True)
class EncodedDocuments:
    """Tokenized documents of one language, in input order.

    Attributes:
        tokens: ids of all documents, one after the other.
        lengths: tokens of each document [documents], EOD included.
        text_bytes: UTF-8 bytes of each document [documents].
        loss_mask: of conversations, 1 for each token that counts in the loss, else 0, uint8, as long as `tokens`.
        loss_text_bytes: UTF-8 bytes of what counts in the loss of each conversation [documents].
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    loss_mask: np.ndarray | None = None
    loss_text_bytes: np.ndarray | None = None

    def head(self, documents: int) -> "EncodedDocuments":
        """Return the first `documents` documents."""
        lengths = self.lengths[:documents]
        tokens = int(lengths.sum())
        mask = None if self.loss_mask is None else self.loss_mask[:tokens]
        counted = None if self.loss_text_bytes is None else self.loss_text_bytes[:documents]
        return EncodedDocuments(self.tokens[:tokens], lengths, self.text_bytes[:documents], mask, counted)


@dataclasses.dataclass(frozen=True)
class EncodedBlock:
    """Result of one block: tokenized documents by language, and counts of what was left out."""

    languages: dict[str, EncodedDocuments]
    counts: Counter
    first_errors: dict[str, str]
    disk_bytes: int


class BlockEncoder:
    """Tokenizes blocks of lines in the calling thread."""

    def __init__(self, tokenizer: Tokenizer, options: EncoderOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self._mentions = SpecialTokenSearch(tokenizer.special_tokens)

    def encode(self, block: Block) -> EncodedBlock:
        """Tokenize a block. Raises UserError for a bad line if `stop_on_error` is set."""
        counts: Counter[str] = Counter()
        first: dict[str, str] = {}
        texts: dict[str, list[str]] = {}
        for language, text in read_documents(block, self.options.documents, counts, first):
            texts.setdefault(language, []).append(text)
            if (token := self._mentions.first(text)) is not None:
                counts[self.options.mention_reason] += 1
                first.setdefault(self.options.mention_reason, f"{block.source}: {token}")
        languages = {language: self._encode_texts(group, counts) for language, group in texts.items()}
        return EncodedBlock(languages, counts, first, block.disk_bytes)

    def _encode_texts(self, texts: list[str], counts: Counter) -> EncodedDocuments:
        tokens, lengths, sizes = array.array("i"), [], []
        encoded = (ids for batch in text_batches(texts) for ids in self.tokenizer.encode_batch(batch))
        for text, ids in zip(texts, encoded, strict=True):
            if not ids:
                counts[NO_TOKENS] += 1
                continue
            tokens.fromlist(ids)
            counts[EOD_INSIDE] += self.tokenizer.eod in ids
            if self.options.append_eod:
                tokens.append(self.tokenizer.eod)
            lengths.append(len(ids) + self.options.append_eod)
            sizes.append(len(text) if text.isascii() else len(text.encode("utf-8")))
        joined = np.frombuffer(tokens, dtype=np.int32) if tokens else np.empty(0, np.int32)
        check_vocabulary(joined, self.tokenizer, self.options)
        return EncodedDocuments(
            joined.astype(self.tokenizer.dtype), np.array(lengths, np.int32), np.array(sizes, np.int64)
        )


def check_vocabulary(tokens: np.ndarray, tokenizer: Tokenizer, options: EncoderOptions) -> None:
    """Raise UserError if one of the token ids is larger than those of the model."""
    limit = options.model_vocabulary
    if limit is not None and len(tokens) and int(tokens.max()) >= limit:
        raise UserError(
            f"{tokenizer.path}: gives the token id {int(tokens.max())}, and config.json beside it says that "
            f"the model has {limit:,} ids (vocab_size); use the model's own tokenizer"
        )


def text_batches(texts: list[str]) -> Iterator[list[str]]:
    """Split texts into short lists: while a batch is tokenized, it needs about 170 bytes of memory a character."""
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


Result_co = TypeVar("Result_co", covariant=True)


class BlockTask(Protocol[Result_co]):
    """Work on blocks in worker processes, which get a copy of it: tokenizing as `BlockEncoder`, or counting."""

    def encode(self, block: Block) -> Result_co:
        """Return the result of one block."""
        ...


_worker_encoder: BlockTask | None = None


def _start_worker(encoder: BlockTask) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = encoder


def _encode_in_worker(block: Block) -> Any:
    assert _worker_encoder is not None
    return _worker_encoder.encode(block)


def _is_ready() -> bool:
    return _worker_encoder is not None


@contextlib.contextmanager
def worker_pool(encoder: BlockTask, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Start worker processes. Call it before starting threads, so that forking is safe."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    try:
        pool.submit(_is_ready).result()
        yield pool
    except BrokenProcessPool:
        raise UserError("a worker process was killed, likely for want of memory; pass fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def encode_blocks(pool: ProcessPoolExecutor, blocks: Iterable[Block], workers: int) -> Iterator[Any]:
    """Run the pool's `BlockTask` on blocks and yield results in the order of the blocks, for any number of workers.

    At most `BLOCKS_AHEAD` blocks per worker wait in memory.
    """
    waiting: deque[Future[Any]] = deque()
    for block in blocks:
        waiting.append(pool.submit(_encode_in_worker, block))
        if len(waiting) > workers * BLOCKS_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
