"""Preprocess text files into one indexed dataset and manifest per language."""

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_moe_lpr.data.chat_template import read_chat_template
from megatron_moe_lpr.data.indexed import IndexedWriter, shuffle_documents
from megatron_moe_lpr.data.manifest import Manifest, Source, bin_path, manifest_path
from megatron_moe_lpr.data.preparation.chat_conversations import conversation_columns
from megatron_moe_lpr.data.preparation.chat_encoding import ChatEncoder, messages_key
from megatron_moe_lpr.data.preparation.documents import KEPT
from megatron_moe_lpr.data.preparation.encoding import (
    BlockEncoder,
    EncodedBlock,
    EncodedDocuments,
    EncoderOptions,
    encode_blocks,
    worker_pool,
)
from megatron_moe_lpr.data.preparation.output_lock import output_lock
from megatron_moe_lpr.data.preparation.publishing import partial_directory, publish, refuse_existing
from megatron_moe_lpr.data.preparation.sources import (
    Slice,
    check_beginning,
    disk_bytes,
    expand_inputs,
    parquet_columns,
    partition_slices,
    read_blocks,
)
from megatron_moe_lpr.data.tokenizer import Tokenizer, load_tokenizer, model_vocabulary
from megatron_moe_lpr.errors import UserError, name_file_in_oserror
from megatron_moe_lpr.files.atomic_file import is_same_file
from megatron_moe_lpr.progress import ProgressReport

MAX_LANGUAGES = 500


@dataclasses.dataclass(frozen=True)
class PreprocessingOptions:
    """Inputs, tokenization and output of a preprocessing run; fields as the flags of `moe-lpr preprocess`."""

    inputs: Sequence[str]
    output_prefix: str
    encoder: EncoderOptions
    workers: int = 1
    max_documents: int | None = None
    shuffle_seed: int | None = None
    partition: tuple[int, int] = (1, 1)
    """(index of this partition, from 1; number of partitions)."""
    overwrite: bool = False

    def prefix(self, language: str) -> str:
        """Return the output prefix of a language."""
        name = self.output_prefix if self.encoder.documents.language else f"{self.output_prefix}_{language}"
        index, count = self.partition
        return name if count == 1 else f"{name}-{index:05d}-of-{count:05d}"


class PartialDatasets:
    """The datasets being written, one per language, in a work directory that is removed if the run fails."""

    def __init__(self, directory: Path, plan: PreprocessingOptions, dtype: np.dtype) -> None:
        self.directory, self.plan, self.dtype = directory, plan, dtype
        self.writers: dict[str, IndexedWriter] = {}
        self.locks = contextlib.ExitStack()
        self.text_bytes: Counter = Counter()
        self.loss_text_bytes: Counter = Counter()
        self.largest_token: dict[str, int] = {}
        self.documents = self.tokens = 0

    def append(self, language: str, documents: EncodedDocuments) -> None:
        """Append documents, as many as --max-documents still allows."""
        writer = self.writers.get(language) or self.open(language)
        if self.plan.max_documents is not None:
            documents = documents.head(self.plan.max_documents - writer.documents)
        writer.append(documents.tokens, documents.lengths, documents.loss_mask)
        self.largest_token[language] = max(self.largest_token.get(language, 0), int(documents.tokens.max(initial=0)))
        self.text_bytes[language] += int(documents.text_bytes.sum())
        if documents.loss_text_bytes is not None:
            self.loss_text_bytes[language] += int(documents.loss_text_bytes.sum())
        self.documents += len(documents.lengths)
        self.tokens += len(documents.tokens)

    def is_full(self) -> bool:
        """Whether a run of one language has reached --max-documents."""
        language = self.plan.encoder.documents.language
        return language in self.writers and self.writers[language].documents == self.plan.max_documents

    def finish(self, language: str) -> tuple[str, str, str | None]:
        """Complete the files of a language; return their prefix and the checksums of .bin and (of chat) .loss_mask."""
        writer = self.writers[language]
        writer.finish()
        if self.plan.shuffle_seed is None:
            return writer.prefix, writer.checksum, writer.loss_mask_checksum
        shuffled = f"{writer.prefix}.shuffled"
        checksums = shuffle_documents(writer.prefix, shuffled, writer.dtype, self.plan.shuffle_seed)
        bin_path(writer.prefix).unlink()
        return shuffled, *checksums

    def close(self) -> None:
        """Close all files, finished or not, and release the locks of their prefixes."""
        with self.locks:
            for writer in self.writers.values():
                writer.__exit__(None, None, None)

    def open(self, language: str) -> IndexedWriter:
        """Start the dataset of a language; raises UserError where its output exists."""
        if len(self.writers) >= MAX_LANGUAGES:
            raise UserError(f"--language-key: more than {MAX_LANGUAGES} languages, the last one {language!r}")
        prefix = self.plan.prefix(language)
        if any(is_same_file(Path(name), manifest_path(prefix)) for name in expand_inputs(self.plan.inputs)):
            raise UserError(f"--output-prefix {prefix}: its manifest would replace the input {prefix}.json")
        self.locks.enter_context(output_lock(prefix))
        refuse_existing(prefix, self.plan.overwrite)
        self.writers[language] = IndexedWriter(str(self.directory / language), self.dtype, self.plan.encoder.chat)
        return self.writers[language]


def preprocess(plan: PreprocessingOptions) -> dict[str, Manifest]:
    """Write PREFIX.bin, .idx, .json and, of conversations, .loss_mask for each language; return manifests by prefix.

    The result does not depend on the number of workers. Memory grows with the input only by 4 bytes per document (20
    while shuffling).

    Raises:
        UserError: bad input; nothing is left behind.
    """
    names = expand_inputs(plan.inputs)
    slices = partition_slices(names, *plan.partition)
    tokenizer = plan_tokenizer(plan)
    check_inputs(plan, slices, tokenizer)
    encoder = block_encoder(plan, tokenizer)
    if note := tokenizer.eod_note():
        print(f"note: {note}", file=sys.stderr)
    language = plan.encoder.documents.language
    with name_file_in_oserror(plan.output_prefix), partial_directory(plan.output_prefix) as directory:
        datasets = PartialDatasets(directory, plan, tokenizer.dtype)
        try:
            if language:
                datasets.open(language)
            skipped = _encode_into(datasets, slices, encoder)
            template = _manifest_template(plan, encoder, names, skipped)
            return {plan.prefix(each): _publish(datasets, each, template) for each in sorted(datasets.writers)}
        finally:
            datasets.close()


def plan_tokenizer(plan: PreprocessingOptions) -> Tokenizer:
    """Return the tokenizer of the run. Special tokens are recognised in conversations: the template writes them."""
    options = plan.encoder
    return load_tokenizer(options.tokenizer, options.eod_token, options.split_special_tokens and not options.chat)


def block_encoder(plan: PreprocessingOptions, tokenizer: Tokenizer) -> BlockEncoder | ChatEncoder:
    """Return what tokenizes the run's blocks, checked.

    Raises:
        UserError: the chat template is not valid, or it is not clear which part of a conversation the assistant writes.
    """
    options = dataclasses.replace(plan.encoder, model_vocabulary=model_vocabulary(tokenizer.path))
    if not options.chat:
        return BlockEncoder(tokenizer, options)
    encoder = ChatEncoder(tokenizer, options, read_chat_template(tokenizer.path.parent, options.chat_template))
    encoder.check_template()
    return encoder


def check_inputs(plan: PreprocessingOptions, slices: Sequence[Slice], tokenizer: Tokenizer) -> None:
    """Check inputs and tokenizer before the work starts, so that errors do not appear after hours.

    Raises:
        UserError: an input is not what its suffix says or lacks a column, the tokenizer has no end-of-document token,
            or the config.json beside it is damaged.
        OSError: an input cannot be read.
    """
    for piece in slices:
        check_beginning(piece.source, wanted_columns(plan, piece.source))
    model_vocabulary(tokenizer.path)
    if not 0 <= tokenizer.eod < tokenizer.vocab_size:
        raise UserError(f"{tokenizer.path}: has no id {tokenizer.eod} to end documents with; pass --eod-token")


def wanted_columns(plan: PreprocessingOptions, source: str) -> list[str]:
    """Return the columns to read of a parquet file: text or conversation and, with --language-key, language."""
    options = plan.encoder.documents
    columns = [options.json_key]
    if plan.encoder.chat and source.endswith(".parquet"):
        columns = conversation_columns(parquet_columns(source), messages_key(options))
    return [*columns, *([options.language_key] if options.language_key else [])]


def _manifest_template(
    plan: PreprocessingOptions, encoder: BlockEncoder | ChatEncoder, names: list[str], skipped: Counter
) -> Manifest:
    """Return a manifest with the fields that all languages of a run share."""
    tokenizer = encoder.tokenizer
    return Manifest(
        language="",
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=plan.encoder.append_eod and not plan.encoder.chat,
        dtype=tokenizer.dtype.name,
        documents=0,
        tokens=0,
        text_bytes=0,
        bin_bytes=0,
        idx_bytes=0,
        index_sha256="",
        skipped=dict(sorted((+skipped).items())),
        sources=[Source(name, disk_bytes(name)) for name in names],
        partition="/".join(map(str, plan.partition)) if plan.partition[1] > 1 else None,
        shuffle_seed=plan.shuffle_seed,
        chat=plan.encoder.chat,
        chat_template=encoder.template.fingerprint if isinstance(encoder, ChatEncoder) and encoder.template else None,
    )


def _encode_into(datasets: PartialDatasets, slices: list[Slice], encoder: BlockEncoder | ChatEncoder) -> Counter:
    skipped: Counter[str] = Counter()
    first: dict[str, str] = {}
    plan = datasets.plan
    total = sum(piece.end - piece.start for piece in slices) or None
    longest = plan.encoder.documents.max_line_bytes
    blocks = (block for piece in slices for block in read_blocks(piece, wanted_columns(plan, piece.source), longest))
    with worker_pool(encoder, plan.workers) as pool, ProgressReport("preprocessing", total) as progress:
        for block in encode_blocks(pool, blocks, plan.workers):
            skipped.update(block.counts)
            first = {**block.first_errors, **first}
            _append_block(datasets, block, progress)
            if datasets.is_full():
                break
    for reason, count in sorted((+skipped).items()):
        example = f" (first: {first[reason]})" if reason in first else ""
        print(f"{'kept' if reason.startswith(KEPT) else 'skipped'}: {count:,} {reason}{example}", file=sys.stderr)
    return skipped


def _append_block(datasets: PartialDatasets, block: EncodedBlock, progress: ProgressReport) -> None:
    documents, tokens = datasets.documents, datasets.tokens
    for language, encoded in block.languages.items():
        datasets.append(language, encoded)
    size = sum(int(encoded.text_bytes.sum()) for encoded in block.languages.values())
    counts = {"documents": datasets.documents - documents, "tokens": datasets.tokens - tokens, "MB": size / 1e6}
    progress.advance(block.disk_bytes, counts)


def _publish(datasets: PartialDatasets, language: str, template: Manifest) -> Manifest:
    (partial, checksum, mask_checksum), writer = datasets.finish(language), datasets.writers[language]
    manifest = dataclasses.replace(
        template,
        language=language,
        documents=writer.documents,
        tokens=writer.tokens,
        text_bytes=datasets.text_bytes[language],
        largest_token=datasets.largest_token.get(language, 0),
        bin_xxh3_128=checksum,
        loss_tokens=writer.loss_tokens if template.chat else None,
        loss_mask_xxh3_128=mask_checksum,
        loss_text_bytes=datasets.loss_text_bytes[language] if template.chat else None,
    )
    # Check again, because not every file system supports the lock of the prefix.
    refuse_existing(datasets.plan.prefix(language), datasets.plan.overwrite)
    return publish(partial, datasets.plan.prefix(language), manifest)
