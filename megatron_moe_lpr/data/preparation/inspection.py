"""Tables of indexed datasets: counts by language, and decoded samples; in conversations, which tokens count."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from megatron_moe_lpr.data.indexed import open_loss_mask, open_tokens, read_lengths
from megatron_moe_lpr.data.manifest import Manifest, check_tokenizer
from megatron_moe_lpr.data.tokenizer import Tokenizer
from megatron_moe_lpr.errors import UserError

COUNTED_STYLE = "bold green"
"""Style of the tokens that count in the loss, which stand in double square brackets where there are no styles."""


def counts_table(manifests: Mapping[str, Manifest]) -> Table:
    """Return a table with one row per dataset: language, documents, tokens, bytes per token."""
    table = Table(title="datasets")
    table.add_column("prefix", overflow="fold")
    table.add_column("language")
    has_chat = any(manifest.chat for manifest in manifests.values())
    for column in ("documents", "tokens", "text MB", "tokens/document", "bytes/token", "longest", "skipped"):
        table.add_column(column, justify="right")
    if has_chat:
        table.add_column("in the loss", justify="right")
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
            *([_fraction_counted(manifest)] if has_chat else []),
        )
    return table


def _fraction_counted(manifest: Manifest) -> str:
    counted = manifest.loss_tokens if manifest.chat and manifest.loss_tokens is not None else manifest.tokens
    return f"{counted / max(manifest.tokens, 1):.1%}"


def samples_table(
    prefix: str,
    manifest: Manifest,
    tokenizer: Tokenizer,
    documents: Sequence[int],
    max_tokens: int,
    has_styles: bool = False,
) -> Table:
    """Return a table with the decoded beginnings of some documents.

    Args:
        max_tokens: decoded of each document.
        has_styles: the table will be shown in a terminal, so that a style marks tokens that count in the loss, not
            brackets.

    Raises:
        UserError: the tokenizer is not the one of the dataset, or the document does not exist.
    """
    check_tokenizer(prefix, manifest, tokenizer.fingerprint, str(tokenizer.path))
    lengths, tokens = read_lengths(prefix), open_tokens(prefix, np.dtype(manifest.dtype))
    counted = open_loss_mask(prefix) if manifest.chat else None
    ends = np.cumsum(lengths, dtype=np.int64)
    table = Table(title=Text(f"{prefix} ({manifest.language})"), show_lines=True)
    table.add_column("document", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("EOD")
    table.add_column("text", overflow="fold")
    for document in documents:
        if not 0 <= document < len(lengths):
            raise UserError(f"{prefix}: no document {document}; it has {len(lengths):,}, counted from 0")
        place = slice(ends[document] - lengths[document], ends[document])
        ids = tokens[place]
        has_eod = "yes" if len(ids) and ids[-1] == manifest.eod else "no"
        shown = ids[:max_tokens]
        if counted is None:
            text = Text(tokenizer.decode(shown.tolist()))
        else:
            text = conversation_text(tokenizer, shown, counted[place][:max_tokens], has_styles)
        table.add_row(str(document), f"{len(ids):,}", has_eod, text)
    return table


def conversation_text(tokenizer: Tokenizer, ids: np.ndarray, counted: np.ndarray, has_styles: bool) -> Text:
    """Decode tokens [tokens] and mark those that count in the loss, by a style or by double square brackets."""
    text = Text()
    edges = np.flatnonzero(np.diff(counted)) + 1
    for part, mask in zip(np.split(ids, edges), np.split(counted, edges), strict=True):
        decoded = tokenizer.decode(part.tolist())
        if not (len(mask) and mask[0]):
            text.append(decoded)
        elif has_styles:
            text.append(decoded, style=COUNTED_STYLE)
        else:
            text.append(f"[[{decoded}]]")
    return text
