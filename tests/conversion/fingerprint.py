"""Whether a trained checkpoint still holds the dense model's weights, to the bit."""

from pathlib import Path

from megatron_moe_lpr.checkpoint.format.chain import open_reader, resolve_and_hold
from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.conversion.exporter import read_row
from megatron_moe_lpr.conversion.reading import check_model_tensors
from megatron_moe_lpr.conversion.tensors.blocks import mark_inserted
from megatron_moe_lpr.conversion.tensors.fingerprint import OriginalFingerprint
from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, MOE_LAYOUTS, model_rows


def checkpoint_fingerprint(load: Path, base: Path | None = None) -> str:
    """The fingerprint of the original weights as they are now; compare it with the card's.

    Raises:
        UserError: no complete checkpoint at `load`, or a tensor that is missing or damaged.
    """
    fingerprint = OriginalFingerprint()
    with resolve_and_hold(load, base) as iteration:
        checkpoint = resolve_checkpoint(iteration, base)
        card, architecture = checkpoint.card(), checkpoint.architecture()
        # A mixture base's own names are those of its architecture.
        layout = MOE_LAYOUTS[card.family] if card.has_mixture_base else DENSE_LAYOUT
        rows = model_rows(architecture, card.experts_per_layer, layout, card.expansions, card.new_tokens)
        rows = mark_inserted(rows, architecture.num_layers, card.inserted_blocks)
        reader = open_reader(checkpoint)
        check_model_tensors(rows, reader)
        for row in (row for row in rows if row.kind.is_original):
            tensors = read_row(row, reader, architecture)
            for name, tensor in zip(row.dense_names, tensors, strict=True):
                fingerprint.add(name, tensor)
    return fingerprint.hexdigest()
