"""What must agree before a graft: the checkpoint, the base model that it was upcycled from, and the instruct model."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory
from megatron_moe_lpr.conversion.hugging_face.hf_directory import open_hf_directory
from megatron_moe_lpr.conversion.hugging_face.tokenizer_samples import sample_texts
from megatron_moe_lpr.conversion.import_options import ImportOptions
from megatron_moe_lpr.conversion.tensor_sources import TensorSources, find_tensor_sources
from megatron_moe_lpr.conversion.tensors.fingerprint import OriginalFingerprint
from megatron_moe_lpr.conversion.upcycling import read_finite
from megatron_moe_lpr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.tensors import Row
from megatron_moe_lpr.progress import ProgressReport

SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "tied_embeddings",
)
"""Fields of an architecture that base and instruct model must have in common."""


def open_dense(directory: Path, flag: str) -> TensorSources:
    """Open a dense Hugging Face model. Raises UserError where it is none, or a mixture."""
    if open_hf_directory(directory).is_moe:
        raise UserError(f"{flag} {directory}: a dense model is expected, as the checkpoint was upcycled from one")
    sources = find_tensor_sources(ImportOptions(hf=directory, num_experts=1))
    if sources.inserted_blocks:
        raise UserError(f"{flag} {directory}: a dense model is expected, as the checkpoint was upcycled from one")
    return sources


def read_parts(sources: TensorSources, row: Row) -> list[torch.Tensor]:
    """Read the Hugging Face tensors of a row of a dense model, in the dtype that an import stores."""
    return [read_finite(sources, name).to(sources.stored_dtype(row)) for name in row.names]


def check_graftable(card: CheckpointCard, load: Path) -> None:
    """Check that the checkpoint has experts to graft onto.

    Raises:
        UserError: it is dense, has inserted blocks, or a base model that is a mixture.
    """
    if card.has_mixture_base:
        raise UserError(
            f"--load {load}: its base model is a mixture; only what was upcycled from a dense one is grafted"
        )
    if not card.is_moe:
        raise UserError(f"--load {load}: has no new experts to graft onto; the instruct model itself is the result")


def check_shared_weights(card: CheckpointCard, load: Path, base: TensorSources) -> None:
    """Check that the checkpoint's shared weights are still the base model's.

    What the history records from before the upcycling, where this project has trained the base model too, is in the
    base model's own card and does not count.

    Raises:
        UserError: a run has trained the base model's own weights since.
    """
    before = base.model.card.history if base.model.card else []
    since = card.history[len(before) :] if card.history[: len(before)] == before else card.history
    for entry in since:
        if entry.get("stage") == "full" or entry.get("train_embeddings"):
            raise UserError(
                f"--load {load}: a run with {'--stage full' if entry.get('stage') == 'full' else '--train-embeddings'} "
                "has trained the base model's own weights, which a graft would replace; graft onto a checkpoint of "
                "stages 1 and 2"
            )


def check_base(base: TensorSources, checkpoint: CheckpointDirectory, card: CheckpointCard) -> None:
    """Read all weights of the base model and compare their fingerprint with the checkpoint's.

    Raises:
        UserError: the checkpoint was upcycled from another model.
    """
    place, architecture = f"--base {base.model.path}", base.model.architecture
    if architecture != checkpoint.architecture():
        fields = ", ".join(_different(architecture, checkpoint.architecture()))
        raise UserError(
            f"{place}: not the model that the checkpoint was upcycled from: its config.json differs in {fields}"
        )
    fingerprint = OriginalFingerprint()
    total = sum(math.prod(row.shape) * base.stored_dtype(row).itemsize for row in base.rows)
    with ProgressReport("checking --base", total) as progress:
        for name, tensor in _dense_tensors(base):
            fingerprint.add(name, tensor)
            progress.advance(tensor.nbytes, {"MB": tensor.nbytes / 1e6})
    if fingerprint.hexdigest() != card.original_fingerprint:
        raise UserError(f"{place}: not the model that the checkpoint was upcycled from: its weights are others")


def _dense_tensors(sources: TensorSources) -> Iterator[tuple[str, torch.Tensor]]:
    for row in sources.rows:
        yield from zip(row.dense_names, read_parts(sources, row), strict=True)


def check_instruct(instruct: TensorSources, base: TensorSources, card: CheckpointCard) -> list[str]:
    """Check that the instruct model can be the base model's. Return settings of its own, a line each.

    Raises:
        UserError: another family or size, or a vocabulary that does not continue the base model's.
    """
    place, ours, theirs = f"--instruct {instruct.model.path}", instruct.model.architecture, base.model.architecture
    if ours.family != theirs.family:
        raise UserError(f"{place}: a {ours.family.name}, and the base model is a {theirs.family.name}")
    for name in SIZES:
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(f"{place}: {name} {getattr(ours, name)}, and the base model has {getattr(theirs, name)}")
    if ours.vocab_size < theirs.vocab_size:
        raise UserError(f"{place}: a vocabulary of {ours.vocab_size:,} rows, the base model has {theirs.vocab_size:,}")
    if ours.vocab_size > theirs.vocab_size and card.added_rows:
        raise UserError(
            f"{place}: {ours.vocab_size - theirs.vocab_size:,} rows more than the base model, where the checkpoint's "
            "vocabulary extension has its own tokens; extend the instruct model's tokenizer and train again"
        )
    return [
        f"{name} is the instruct model's ({getattr(ours, name)}); the base model's was {getattr(theirs, name)}"
        for name in _different(ours, theirs)
    ]


def check_tokenizers(instruct: Path, checkpoint: CheckpointDirectory, card: CheckpointCard) -> None:
    """Check that the instruct model's tokenizer splits text as the checkpoint's does; it may know further tokens.

    Raises:
        UserError: naming the first difference.
    """
    ours, theirs = _tokenizer(checkpoint.side_directory), _tokenizer(instruct)
    if ours is None or theirs is None or ours.fingerprint == theirs.fingerprint:
        return
    if card.added_rows:
        if theirs.fingerprint != card.earlier_tokenizers[0].fingerprint:
            raise UserError(
                f"--instruct {instruct}: its tokenizer is not the one that was extended; extend the instruct model's "
                "tokenizer, and train stage 1 with it"
            )
        return
    for text in sample_texts(ours):
        if ours.encode_batch([text]) != theirs.encode_batch([text]):
            raise UserError(f"--instruct {instruct}: its tokenizer splits {text!r} otherwise than the checkpoint's")


def _tokenizer(directory: Path) -> Tokenizer | None:
    try:
        return load_tokenizer(directory)
    except UserError:  # a model without a tokenizer, as of tests
        return None


def _different(first: Architecture, second: Architecture) -> list[str]:
    names = [field.name for field in dataclasses.fields(Architecture)]
    return [name for name in names if getattr(first, name) != getattr(second, name)]
