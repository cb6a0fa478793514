"""Download the paper's corpora from the Hugging Face hub: CulturaX, SlimPajama for en, SkyPile for zh.

Writes OUTPUT/train/LANGUAGE/ and OUTPUT/valid/LANGUAGE/, which tools/preprocess_data.py reads. Started again, it goes
on where it stopped; a file in its place is complete and was compared with its checksum.
"""

import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.data.language_names import canonical_language, split_names
from megatron_moe_lpr.data.original_languages import parse_languages
from megatron_moe_lpr.data.preparation.corpora import CORPORA, choose_corpus
from megatron_moe_lpr.data.preparation.hub import CorpusFile, disk_need, download, find_files, remove_staging
from megatron_moe_lpr.errors import UserError, naming
from megatron_moe_lpr.files.file_lock import directory_lock
from megatron_moe_lpr.files.filesystem import atomic_file, check_output_file
from megatron_moe_lpr.flag_ranges import NonNegativeInt, PositiveInt

RECORD_FILE = "corpus.json"


@dataclasses.dataclass(frozen=True)
class Flags:
    """Fetch the paper's corpora."""

    languages: list[str]
    """LANGUAGE, or LANGUAGE=N for N files instead of --shards, for example el=30 hu=30 en=8."""
    output: Path
    """Directory for the text and for corpus.json, which records its source."""
    shards: PositiveInt = 1
    """Files of each language for training."""
    valid_shards: NonNegativeInt = 1
    """Files of each language for validation, the next ones after those for training."""
    corpus: tuple[str, ...] = ()
    """LANGUAGE=NAME to take another corpus than the paper: culturax, slimpajama or skypile."""
    revision: str = "main"
    """Branch, tag or commit of the data sets."""
    dry_run: bool = False
    """Print what would be fetched, its size and its terms, and fetch nothing."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    words = split_names(flags.languages)
    counts = dict(shard_count(one, flags.shards) for one in words)
    if len(counts) < len(words):
        raise UserError("--languages: one is named twice")
    if flags.valid_shards < 0:
        raise UserError(f"--valid-shards {flags.valid_shards}: at least 0")
    if flags.output.exists() and not flags.output.is_dir():
        raise UserError(f"--output {flags.output}: is a file; give a directory")
    if flags.output.is_dir():
        check_output_file(flags.output / RECORD_FILE, "--output")
    choices = {canonical_language(name): corpus for name, _, corpus in (one.partition("=") for one in flags.corpus)}
    check_choices(choices, counts)
    names, shards = {}, {}
    for language, count in counts.items():
        names[language], corpus = choose_corpus(language, choices)
        shards[language] = find_files(corpus, language, flags.revision, count, flags.valid_shards, flags.output)
    show(names, shards, flags.dry_run)
    everything = [shard for some in shards.values() for shard in some]
    missing, free = disk_need(everything, flags.output)
    need = f"{missing / 1e9:,.3f} GB to fetch, {free / 1e9:,.1f} GB free below {flags.output}"
    print(need, flush=True)
    if flags.dry_run:
        return
    if missing > free:
        raise UserError(f"--output {flags.output}: {need}; ask for fewer files")
    with directory_lock(flags.output, "--output"):
        fetch(everything, flags.output)
        write_record(names, shards, flags.output)


def check_choices(choices: dict[str, str], counts: dict[str, int]) -> None:
    """Before the hub is asked for anything. Raises UserError."""
    for language in choices:
        if language not in counts:
            raise UserError(f"--corpus {language}={choices[language]}: --languages does not ask for {language}")
    for language in counts:
        choose_corpus(language, choices)


def shard_count(text: str, default: int) -> tuple[str, int]:
    """`el=30` to ("el", 30)."""
    language, _, number = text.partition("=")
    count = default if not number else int(number) if number.isdecimal() and len(number) < 10 else 0
    if not language or count < 1:
        raise UserError(f"--languages {text}: write LANGUAGE or LANGUAGE=N, with at least one file")
    (name,), notes = parse_languages([language], "--languages")
    for note in notes:
        print(f"note: {note}")
    return name, count


def show(names: dict[str, str], shards: dict[str, list[CorpusFile]], with_files: bool) -> None:
    """Sizes and terms by language; with every file where asked."""
    table = Table("language", "data set", "files", "GB", "to fetch, GB", title="corpora")
    for language, some in shards.items():
        sizes = [sum(one.num_bytes for one in some), sum(one.num_bytes for one in some if not one.is_complete)]
        repository = CORPORA[names[language]].repository
        table.add_row(language, repository, str(len(some)), *(f"{size / 1e9:,.3f}" for size in sizes))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for name in dict.fromkeys(names.values()):
        print(f"{CORPORA[name].repository}: {CORPORA[name].terms}")
    if with_files:
        for shard in (one for some in shards.values() for one in some):
            state = "there" if shard.is_complete else f"{shard.num_bytes:,} bytes"
            print(f"{shard.repository}@{shard.revision[:8]} {shard.path} -> {shard.target} ({state})")


def fetch(shards: list[CorpusFile], output: Path) -> None:
    """What is not there, one file after the other. Raises UserError."""
    for number, shard in enumerate(shards, 1):
        if not shard.is_complete:
            print(f"{number} of {len(shards)}: {shard.target}", flush=True)
            download(shard, output)
    remove_staging(output)


def write_record(names: dict[str, str], shards: dict[str, list[CorpusFile]], output: Path) -> None:
    """Where each file came from, for whoever asks later."""
    record = {
        language: {
            "data_set": some[0].repository,
            "revision": some[0].revision,
            "terms": CORPORA[names[language]].terms,
            "files": {
                str(one.target.relative_to(output)): {"path": one.path, "bytes": one.num_bytes, "sha256": one.sha256}
                for one in some
            },
        }
        for language, some in shards.items()
    }
    with naming(output / RECORD_FILE), atomic_file(output / RECORD_FILE) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
