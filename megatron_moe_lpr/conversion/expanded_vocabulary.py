"""The vocabulary in an expansion: rows for the tokens of a further extension, and those of earlier ones, frozen."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.checkpoint.format.chain import TensorReader
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory
from megatron_moe_lpr.conversion.hugging_face.hf_directory import tokenizer_digests, with_tokenizer
from megatron_moe_lpr.conversion.tensors.new_rows import initial_output_rows, initial_rows
from megatron_moe_lpr.data.tokenizer_extension import TokenizerExtension
from megatron_moe_lpr.data.vocabulary_extension import open_extension, tokenizers_before
from megatron_moe_lpr.files.checksum_file import CHECKSUM_FILE
from megatron_moe_lpr.files.links import tree_inside
from megatron_moe_lpr.model.tensors import OUTPUT_NAME, Row


def open_extension_of_checkpoint(
    tokenizer: Path, checkpoint: CheckpointDirectory, card: CheckpointCard
) -> TokenizerExtension:
    """Read an extended tokenizer and check that it extends the one of a checkpoint. Raises UserError."""
    rows = checkpoint.architecture().vocab_size + card.added_rows
    return open_extension(tokenizer, checkpoint.side_directory, rows, str(checkpoint.path))


def side_files(checkpoint: CheckpointDirectory, tokenizer: Path | None) -> dict[str, Path]:
    """The files beside a checkpoint's tensors, with another tokenizer if one is given, by relative path."""
    files = tree_inside(checkpoint.side_directory, checkpoint.path)
    files.pop(CHECKSUM_FILE.name, None)
    return with_tokenizer(files, tokenizer) if tokenizer else files


def card_with_vocabulary(
    card: CheckpointCard, extension: TokenizerExtension | None, files: Mapping[str, Path]
) -> CheckpointCard:
    """The card after an expansion: rows of earlier extensions are frozen, also where it adds no further ones.

    Args:
        card: the card, which still has the vocabulary from before the expansion.
        extension: the extension that comes with the expansion; None: none.
        files: the files beside the expanded checkpoint's tensors.
    """
    before = card.new_tokens
    if extension is None:
        # An extension without rows: what came before it is no longer the latest one, which trains.
        return dataclasses.replace(card, new_tokens=[*before, 0] if before and before[-1] else before)
    return dataclasses.replace(
        card,
        new_tokens=[*before, extension.new_tokens],
        earlier_tokenizers=tokenizers_before(extension, card.earlier_tokenizers),
        tokenizer_files=tokenizer_digests(files),
    )


def further_rows(row: Row, had: Sequence[Row], reader: TensorReader, extension: TokenizerExtension) -> torch.Tensor:
    """The new tensor `row`, made from the rows that the checkpoint has in the same matrix.

    Args:
        had: the checkpoint's tensors.
    """
    parts = [reader.read(one.key)[: one.shape[0]] for one in had if one.names == row.names]
    matrix = parts[0] if len(parts) == 1 else torch.cat(parts)
    make = initial_output_rows if row.names == (OUTPUT_NAME,) else initial_rows
    return make(matrix, extension.pieces)
