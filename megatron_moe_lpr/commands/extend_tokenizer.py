"""Add tokens for new languages to a model's tokenizer, so that their texts become shorter.

The merges of a BPE tokenizer are continued on text of the languages to learn. Old ids stay, and text of the guarded
languages is split as before. Prints bytes a token and tokens a word before and after, on text that is held out, and the
share of the gain that fewer tokens bring. --output gets the tokenizer with extension.json, which `moe-lpr import
--tokenizer` reads, and the printed figures as extension_report.json and .svg.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.conversion.hugging_face.hub import model_directory
from megatron_moe_lpr.conversion.side_files import check_separate
from megatron_moe_lpr.data.preparation.documents import DocumentOptions
from megatron_moe_lpr.data.preparation.sources import MAX_LINE_BYTES
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_ranges import PositiveInt, Range, Seed
from megatron_moe_lpr.vocabulary.extension import ExtensionOptions, extend_tokenizer
from megatron_moe_lpr.vocabulary.language_arguments import parse_sources, parse_weights


@dataclasses.dataclass
class Flags:
    """Add tokens for new languages to a model's tokenizer."""

    hf: str
    """The base model: a Hugging Face directory with its tokenizer and config.json, or a name on the hub."""
    learn: list[str]
    """Text of each language to learn: el=FILES hu=FILES ...; files or quoted globs, as for preprocess."""
    new_tokens: PositiveInt
    """Number of new tokens."""
    output: Path
    """Directory to write the extended tokenizer to."""
    guard: list[str] = dataclasses.field(default_factory=list)
    """Text of each language that is to be split as before: en=FILES es=FILES ..."""
    revision: str | None = None
    """For a name on the hub: branch, tag or commit. Default: its main branch."""
    language_weights: list[str] = dataclasses.field(default_factory=list)
    """Shares of the new tokens: el=2 hu=1 ... Default 1: a saved token for each byte of text counts the same in all."""
    guard_min_count: PositiveInt = 1
    """Guard only what occurs so often in text of a guarded language; above 1 for crawled text with foreign words."""
    json_key: str = "text"
    """The JSON key (or parquet column) of the text."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a line that is not a document."""
    max_line_bytes: PositiveInt = MAX_LINE_BYTES
    """A longer line is not a document."""
    seed: Seed = 0
    """Chooses the documents that are held out to measure with, one in 16."""
    workers: Annotated[int, Range(1, 4096)] = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )
    """Worker processes. The output is the same for every number."""
    overwrite: bool = False
    """Replace existing output."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    # A batch system's SIGTERM cleans up like an error does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    figures = extend_tokenizer(plan(flags))
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in figures.tables():
        console.print(table)
    print(f"{flags.output}: {flags.new_tokens:,} new tokens; give it to import as --tokenizer")


def plan(flags: Flags) -> ExtensionOptions:
    """Check the flags against each other and return the options of the extension. Raises UserError."""
    sources = parse_sources(flags.learn, flags.guard)
    weights = parse_weights(flags.language_weights, sources)
    directory = model_directory(flags.hf, flags.revision)
    if not directory.is_dir():
        raise UserError(
            f"--hf {directory}: {'is a file; give its directory' if directory.exists() else 'no such directory'}"
        )
    check_separate(directory, "--hf", flags.output, "--output")
    if not flags.guard:
        print("note: without --guard, text of languages that the model knows may be split otherwise", file=sys.stderr)
    return ExtensionOptions(
        directory=directory,
        sources=sources,
        new_tokens=flags.new_tokens,
        output=flags.output,
        weights=weights,
        guard_min_count=flags.guard_min_count,
        documents=DocumentOptions(flags.json_key, None, None, flags.on_error == "stop", flags.max_line_bytes),
        seed=flags.seed,
        workers=flags.workers,
        overwrite=flags.overwrite,
    )
