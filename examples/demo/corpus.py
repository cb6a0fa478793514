"""Reads the demo's corpus: JSON lines, compressed or not."""

from collections import Counter
from collections.abc import Iterator

from megatron_moe_lpr.data.preparation.documents import DocumentOptions, read_documents
from megatron_moe_lpr.data.preparation.sources import Slice, disk_bytes, expand_inputs, read_blocks


def texts(inputs: list[str]) -> Iterator[str]:
    """Return the text of every document in files or glob patterns. Raises UserError: there is none."""
    for name in expand_inputs(inputs):
        for block in read_blocks(Slice(name, 0, disk_bytes(name)), ("text",)):
            yield from (text for _, text in read_documents(block, DocumentOptions(language="any"), Counter(), {}))
