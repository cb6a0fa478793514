"""Checkpoints with an extended vocabulary for tests, made from converted ones without a tokenizer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, resolve_checkpoint
from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, model_rows
from tests.conversion.helpers import rewrite_checkpoint


def extend_checkpoint(path: Path, new_tokens: Sequence[int], seed: int = 11) -> None:
    """Give a checkpoint random rows for new tokens, in its own dtype and of the scale of its own rows."""
    directory = resolve_checkpoint(path)
    card, architecture = directory.card(), directory.architecture()
    rows = model_rows(architecture, card.experts_per_layer, DENSE_LAYOUT, card.expansions, new_tokens)
    generator = torch.Generator().manual_seed(seed)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        dtype = tensors["embedding.word_embeddings.weight"].dtype
        for row in rows:
            if row.key not in tensors:
                tensors[row.key] = (0.3 * torch.randn(row.shape, generator=generator)).to(dtype)

    dataclasses.replace(card, new_tokens=list(new_tokens)).write(directory.side_directory / CARD_FILE)
    rewrite_checkpoint(path, add)  # writes the checksums too
