"""Merge indexed datasets of one language and one tokenizer, for example the partitions of a SLURM array."""

import dataclasses

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.data.preparation.merging import merge
from megatron_moe_lpr.flag_ranges import Seed


@dataclasses.dataclass
class Flags:
    """Merge indexed datasets of one language and one tokenizer."""

    input: list[str]
    """Dataset prefixes, or a quoted glob such as 'el-*-of-00008'."""
    output_prefix: str
    """Where to write: PREFIX.bin, PREFIX.idx and PREFIX.json."""
    shuffle_seed: Seed | None = None
    """Shuffle the documents, deterministically; needs disk space for a second copy."""
    allow_missing_partitions: bool = False
    """Merge even if partitions are missing."""
    overwrite: bool = False
    """Replace existing output."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    manifest = merge(
        flags.input, flags.output_prefix, flags.shuffle_seed, flags.overwrite, flags.allow_missing_partitions
    )
    print(f"{flags.output_prefix}: {manifest.language}, {manifest.documents:,} documents, {manifest.tokens:,} tokens")
