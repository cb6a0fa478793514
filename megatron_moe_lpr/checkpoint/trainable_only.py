"""Checkpoints that hold only what a run trains, and the checkpoint that holds the rest: their base."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash

from megatron_moe_lpr.checkpoint.card import Base
from megatron_moe_lpr.checkpoint.directory import CheckpointDirectory, resolve_checkpoint
from megatron_moe_lpr.checkpoint.integrity import checksum_of_file, read_manifest
from megatron_moe_lpr.checkpoint.reader import CheckpointReader, TensorInfo, is_model_key
from megatron_moe_lpr.checkpoint.retention import being_read
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.parameter_kinds import kind_of


def record_base(directory: CheckpointDirectory) -> Base:
    """What a checkpoint of trained weights says of the one its other weights lie in."""
    return Base(str(directory.path), weights_checksum(directory))


def weights_checksum(directory: CheckpointDirectory) -> str:
    """xxh3_128 of the manifest's entries of all tensor files; where there is no manifest, the files are read.

    Raises:
        UserError: the manifest is damaged.
    """
    files = read_manifest(directory.path)
    if files is None:
        files = {path.name: checksum_of_file(path) for path in directory.path.glob("*.distcp")}
    digest = xxhash.xxh3_128()
    for name in sorted(name for name in files if name.endswith(".distcp")):
        digest.update(f"{name} {files[name].bytes} {files[name].checksum}\n".encode())
    base = directory.card().base
    if base:
        digest.update(base.checksum.encode())
    return digest.hexdigest()


def base_of(directory: CheckpointDirectory) -> CheckpointDirectory | None:
    """The checkpoint that holds the weights `directory` does not; None: it holds all.

    Raises:
        UserError: it is not where the card or --base-checkpoint says, or is another one.
    """
    card = directory.card()
    if card.base is None:
        if directory.base_path is not None:
            raise UserError(
                f"--base-checkpoint {directory.base_path}: {directory.path} holds all weights; leave it out"
            )
        return None
    path = directory.base_path or Path(card.base.path)
    if not path.is_dir():
        raise UserError(
            f"{directory.path}: holds only the weights that were trained, and {path}, where the others are, does not "
            "exist; say with --base-checkpoint where it is now"
        )
    base = resolve_checkpoint(path)
    _check_base(directory, card.base, base)
    return base


def _check_base(directory: CheckpointDirectory, recorded: Base, base: CheckpointDirectory) -> None:
    card, base_card = directory.card(), base.card()
    problem = None
    if base_card.original_fingerprint != card.original_fingerprint:
        problem = "its original weights are others (fingerprint)"
    elif (base_card.experts_per_layer, base_card.expansions) != (card.experts_per_layer, card.expansions):
        problem = "its layers have other numbers of experts"
    elif base_card.inserted_blocks != card.inserted_blocks:
        problem = "its inserted blocks are others"
    elif weights_checksum(base) != recorded.checksum and not _needs_only_originals(directory, base):
        problem = "its weights are others (checksum)"
    if problem:
        raise UserError(
            f"{base.path}: not the base of {directory.path}: {problem}; it was trained from {recorded.path}, give "
            "that one with --base-checkpoint"
        )


def _needs_only_originals(directory: CheckpointDirectory, base: CheckpointDirectory) -> bool:
    """Whether the base is a converted model of which only the dense model's weights are wanted.

    The fingerprint tells all about those; how the converter cut them into files does not matter.
    """
    if base.card().history or base.card().base:
        return False
    wanted = set(CheckpointReader(base.path).tensors) - set(CheckpointReader(directory.path).tensors)
    trained = {"router", "new experts", "earlier experts", "inserted blocks"}
    inserted = directory.card().inserted_blocks
    return not any(kind_of(key, inserted) in trained for key in wanted if is_model_key(key))


def layers_of(directory: CheckpointDirectory) -> list[CheckpointDirectory]:
    """A checkpoint and what it builds on, the complete one first; of a tensor that several hold the last counts."""
    base = base_of(directory)
    return [directory] if base is None else [*layers_of(base), directory]


@contextlib.contextmanager
def reading(directory: CheckpointDirectory) -> Iterator[list[CheckpointDirectory]]:
    """While the block runs, no run removes a checkpoint or what it builds on; yields `layers_of` it."""
    layers = layers_of(directory)
    with contextlib.ExitStack() as locks:
        for layer in layers:
            locks.enter_context(being_read(layer.path))
        yield layers


class LayeredReader:
    """Reads like CheckpointReader, each tensor from the last of several checkpoints that has it."""

    def __init__(self, directories: list[CheckpointDirectory]) -> None:
        self.directory = directories[-1].path
        readers = [CheckpointReader(directory.path) for directory in directories]
        self.sources = {key: reader for reader in readers for key in reader.tensors}
        self.tensors: dict[str, TensorInfo] = {key: reader.tensors[key] for key, reader in self.sources.items()}

    def read(self, key: str) -> torch.Tensor:
        """See CheckpointReader.read."""
        if key not in self.sources:
            raise UserError(f"{self.directory}: the checkpoint has no tensor {key}")
        return self.sources[key].read(key)


TensorReader = CheckpointReader | LayeredReader


def open_reader(directory: CheckpointDirectory) -> TensorReader:
    """All tensors of a checkpoint, its base's included. Raises what `base_of` and CheckpointReader raise."""
    layers = layers_of(directory)
    return CheckpointReader(directory.path) if len(layers) == 1 else LayeredReader(layers)
