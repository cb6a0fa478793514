"""Turn text into Megatron indexed datasets, one language a prefix.

Writes PREFIX.bin, PREFIX.idx and PREFIX.json (the manifest) for --language, or PREFIX_LANGUAGE.* for each language that
--language-key finds. Reads .jsonl, .jsonl.gz, .jsonl.zst, .txt (a document a line) and .parquet. With --chat documents
are conversations, and PREFIX.loss_mask says which of their tokens the assistant writes.
"""

import dataclasses
import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.data.beginning_of_text import begin_note
from megatron_moe_lpr.data.language_names import canonical_language, is_known, language_title, likely_meaning
from megatron_moe_lpr.data.original_languages import parse_languages
from megatron_moe_lpr.data.preparation.documents import LANGUAGE_PATTERN, DocumentOptions
from megatron_moe_lpr.data.preparation.encoding import EncoderOptions
from megatron_moe_lpr.data.preparation.preprocessing import PreprocessingOptions, preprocess
from megatron_moe_lpr.data.preparation.sources import MAX_LINE_BYTES
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_ranges import PositiveInt, Range, Seed
from megatron_moe_lpr.program import command


@dataclasses.dataclass
class Flags:
    """Turn text into Megatron indexed datasets, one language a prefix."""

    input: list[str]
    """Files or globs (quoted), or - for JSON lines on standard input."""
    output_prefix: str
    """Where to write: PREFIX.bin, PREFIX.idx and PREFIX.json."""
    tokenizer: str
    """A directory with a tokenizer.json or a SentencePiece .model, or such a file."""
    language: str | None = None
    """The language of the whole input, for example el; by code or English name, or a tag of your own."""
    language_key: str | None = None
    """The JSON key (or parquet column) of each document's language; one PREFIX_LANGUAGE each."""
    json_key: str = DocumentOptions.json_key
    """The JSON key (or parquet column) of the text; with --chat of the messages, by default messages."""
    chat: bool = False
    """Read conversations: messages, or prompt and completion. Only what the assistant writes counts in the loss."""
    chat_template: str | None = None
    """With --chat: a file with the chat template, in Jinja. Default: the tokenizer's own."""
    workers: Annotated[int, Range(1, 4096)] = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )
    """Worker processes. The output is the same for every number."""
    max_documents: PositiveInt | None = None
    """Keep only the first N documents (of each language)."""
    shuffle_seed: Seed | None = None
    """Shuffle the documents at the end, deterministically; needs disk space for a second copy."""
    partitions: Annotated[str, tyro.conf.arg(metavar="I/N")] = "1/1"
    """Convert only partition I (from 1) of N, to PREFIX-0000I-of-0000N; merge-datasets joins them."""
    append_eod: bool = True
    """End each document with the end-of-document token; with --chat only where the template writes no end of turn."""
    eod_token: str | None = None
    """The end-of-document token. Default: the tokenizer's end-of-sequence token."""
    split_special_tokens: bool = True
    """Encode special tokens that a text mentions as plain text. Off: as the real tokens. Counted in the manifest."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a line that is not a document. skip: count it in the manifest."""
    max_line_bytes: PositiveInt = MAX_LINE_BYTES
    """A longer line is not a document. Memory for it: some 170 times its size in the tokenizer."""
    overwrite: bool = False
    """Replace existing output."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    # A batch system's SIGTERM cleans up like an error does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    checked = plan(flags)
    if not flags.chat and (note := begin_note(flags.tokenizer)):
        print(f"note: {note}", file=sys.stderr)
    for prefix, manifest in preprocess(checked).items():
        print(
            f"{prefix}: {manifest.language}, {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
            + (f"{manifest.loss_tokens:,} of them in the loss, " if manifest.chat else "")
            + f"{manifest.text_bytes / 1e6:,.1f} MB of text"
        )
        if flags.language_key and not is_known(manifest.language):
            meaning = likely_meaning(manifest.language, ())
            perhaps = f"; write {meaning} if you mean {language_title(meaning)}" if meaning else ""
            print(f"note: --language-key: {manifest.language} is no known language{perhaps}", file=sys.stderr)


def plan(flags: Flags) -> PreprocessingOptions:
    """Check the flags against each other and return the options of the preprocessing. Raises UserError."""
    if (flags.language is None) == (flags.language_key is None):
        raise UserError("give either --language, for a whole input, or --language-key, to split it by a field")
    language = None if flags.language is None else parse_language(flags.language)
    if flags.language_key and any(".txt" in name for name in flags.input):
        raise UserError("--language-key: a .txt has no keys; pass --language")
    if flags.chat_template is not None and not flags.chat:
        raise UserError("--chat-template: is for conversations; pass --chat")
    if flags.chat and any(".txt" in Path(name).suffixes for name in flags.input):
        raise UserError("--chat: a .txt holds no conversations; give JSON lines or parquet")
    partition = parse_partition(flags.partitions)
    for name in ("max_documents", "shuffle_seed"):
        if partition[1] > 1 and getattr(flags, name) is not None:
            hint = f"; pass it to {command('merge-datasets')}" if name == "shuffle_seed" else ""
            raise UserError(f"--{name.replace('_', '-')}: acts on the whole dataset, not on one partition{hint}")
    documents = DocumentOptions(
        flags.json_key, language, flags.language_key, flags.on_error == "stop", flags.max_line_bytes
    )
    encoder = EncoderOptions(
        flags.tokenizer,
        flags.eod_token,
        flags.append_eod,
        documents,
        flags.split_special_tokens,
        chat=flags.chat,
        chat_template=flags.chat_template,
    )
    return PreprocessingOptions(
        inputs=flags.input,
        output_prefix=flags.output_prefix,
        encoder=encoder,
        workers=flags.workers,
        max_documents=flags.max_documents,
        shuffle_seed=flags.shuffle_seed,
        partition=partition,
        overwrite=flags.overwrite,
    )


def parse_language(text: str) -> str:
    """Return `el` for `el`, `EL`, `ell` or `Greek`, and an unknown tag unchanged. Raises UserError."""
    name = canonical_language(text)
    if not LANGUAGE_PATTERN.fullmatch(name):
        raise UserError(f"--language {text!r}: one language; letters and digits, perhaps joined by _ or -")
    for note in parse_languages([text], "--language")[1]:
        print(f"note: {note}", file=sys.stderr)
    return name


def parse_partition(text: str) -> tuple[int, int]:
    """Parse --partitions: `2/8` to (2, 8). Raises UserError."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= index <= count:
        raise UserError(f"--partitions {text}: write I/N with I from 1 to N, for example 1/8 to 8/8")
    return index, count
