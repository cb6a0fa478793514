"""Tables of indexed datasets: counts by language, and decoded samples."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from megatron_moe_lpr.data.indexed import open_tokens, read_lengths
from megatron_moe_lpr.data.manifest import Manifest, check_tokenizer
from megatron_moe_lpr.data.tokenizer import Tokenizer
from megatron_moe_lpr.errors import UserError


def counts_table(manifests: Mapping[str, Manifest]) -> Table:
    """Return a table with one row per dataset: language, documents, tokens, bytes per token."""
    table = Table(title="datasets")
    table.add_column("prefix", overflow="fold")
    table.add_column("language")
    for column in ("documents", "tokens", "text MB", "tokens/document", "bytes/token", "longest", "skipped"):
        table.add_column(column, justify="right")
    for prefix, manifest in manifests.items():
        lengths = read_lengths(prefix)
        table.add_row(
            Text(prefix),
            manifest.language,
            f"{manifest.documents:,}",
            f"{manifest.tokens:,}",
            f"{manifest.text_bytes / 1e6:,.1f}",
            f"{manifest.tokens / max(manifest.documents, 1):,.1f}",
            f"{manifest.text_bytes / max(manifest.tokens, 1):.2f}",
            f"{lengths.max(initial=0):,}",
            ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items()) or "0",
        )
    return table


def samples_table(
    prefix: str, manifest: Manifest, tokenizer: Tokenizer, documents: Sequence[int], max_tokens: int
) -> Table:
    """Return a table with the decoded beginnings of some documents.

    Raises:
        UserError: the tokenizer is not the one of the dataset, or the document does not exist.
    """
    check_tokenizer(prefix, manifest, tokenizer.fingerprint, str(tokenizer.path))
    lengths, tokens = read_lengths(prefix), open_tokens(prefix, np.dtype(manifest.dtype))
    ends = np.cumsum(lengths, dtype=np.int64)
    table = Table(title=Text(f"{prefix} ({manifest.language})"), show_lines=True)
    table.add_column("document", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("EOD")
    table.add_column("text", overflow="fold")
    for document in documents:
        if not 0 <= document < len(lengths):
            raise UserError(f"{prefix}: no document {document}; it has {len(lengths):,}, counted from 0")
        ids = tokens[ends[document] - lengths[document] : ends[document]]
        has_eod = "yes" if len(ids) and ids[-1] == manifest.eod else "no"
        table.add_row(str(document), f"{len(ids):,}", has_eod, Text(tokenizer.decode(ids[:max_tokens].tolist())))
    return table
