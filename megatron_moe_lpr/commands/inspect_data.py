"""Print counts of indexed datasets and some of their documents, decoded."""

import dataclasses
import sys

import numpy as np
from rich.console import Console

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.data.manifest import Manifest, read_manifest, verify_index, verify_tokens
from megatron_moe_lpr.data.preparation.inspection import counts_table, samples_table
from megatron_moe_lpr.data.preparation.merging import expand_prefixes
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.flag_ranges import NonNegativeInt, PositiveInt


@dataclasses.dataclass
class Flags:
    """Print counts of indexed datasets and some of their documents.

    What counts in the loss of a conversation is bold in a terminal, and [[in brackets]] elsewhere."""

    input: list[str]
    """Dataset prefixes, or a quoted glob."""
    tokenizer: str | None = None
    """The tokenizer that the datasets were made with. Without it no documents are decoded."""
    samples: NonNegativeInt = 3
    """Documents to decode from each dataset, spread evenly over it."""
    documents: list[NonNegativeInt] = dataclasses.field(default_factory=list)
    """Decode these documents instead, counted from 0."""
    max_tokens: PositiveInt = 200
    """Tokens to decode of each document."""
    verify: bool = False
    """Read everything and compare it with the checksums in the manifest."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    manifests = {prefix: read_manifest(prefix) for prefix in expand_prefixes(flags.input)}
    if flags.verify:
        verify(manifests)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(counts_table(manifests))
    if flags.tokenizer is None:
        return
    tokenizer = load_tokenizer(flags.tokenizer)
    for prefix, manifest in manifests.items():
        count = min(flags.samples, manifest.documents)
        documents = flags.documents or np.linspace(0, manifest.documents - 1, count).astype(int).tolist()
        shown = samples_table(prefix, manifest, tokenizer, documents, flags.max_tokens, console.is_terminal)
        console.print(shown)


def verify(manifests: dict[str, Manifest]) -> None:
    """Compare index and tokens of each dataset with their checksums. Raises UserError: a file is damaged."""
    for prefix, manifest in manifests.items():
        verify_index(prefix, manifest)
        mask_bytes = manifest.tokens if manifest.chat else 0
        size = f"{(manifest.bin_bytes + manifest.idx_bytes + mask_bytes) / 1e6:,.1f} MB"
        if verify_tokens(prefix, manifest):
            print(f"{prefix}: intact ({size})")
        else:
            print(f"{prefix}: index intact; the .bin was written without a checksum and is not verified ({size})")
