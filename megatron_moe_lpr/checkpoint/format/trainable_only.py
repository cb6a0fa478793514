"""Checkpoints that hold only what a run trains, and the checkpoint that holds the rest: their base."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash

from megatron_moe_lpr.checkpoint.format.card import Base
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory, resolve_checkpoint
from megatron_moe_lpr.checkpoint.format.reader import CheckpointReader, TensorInfo, is_model_key
from megatron_moe_lpr.checkpoint.format.retention import RemovedCheckpoint, being_read
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import checksum_of_file, read_manifest
from megatron_moe_lpr.model.parameter_kinds import kind_of

LOOK_UPS = 5
"""Of the latest checkpoint of a run that removes older ones meanwhile."""


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
    base = _find_base(directory)
    _check_base(directory, card.base, base)
    return base


def _find_base(directory: CheckpointDirectory) -> CheckpointDirectory:
    """Where the base of a checkpoint that has one should be, not compared with what the card says of it."""
    recorded = directory.card().base
    path = directory.base_path or Path(recorded.path if recorded else "")
    if not path.is_dir():
        raise UserError(
            f"{directory.path}: holds only the weights that were trained, and {path}, where the others are, does not "
            "exist; say with --base-checkpoint where it is now"
        )
    return resolve_checkpoint(path)


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
    with contextlib.ExitStack() as locks:
        _keep(directory, locks)
        yield layers_of(directory)


def _keep(directory: CheckpointDirectory, locks: contextlib.ExitStack) -> None:
    """Lock a checkpoint before anything in it is read, then, by its card, what it builds on."""
    locks.enter_context(being_read(directory.path))
    if directory.card().base is not None:
        _keep(_find_base(directory), locks)


@contextlib.contextmanager
def kept_for_reading(path: Path, base: Path | None = None, to_the_end: bool = True) -> Iterator[Path]:
    """Find the checkpoint that `path` means; while the block runs, no run removes it or what it builds on.

    For commands that plan by a checkpoint's small files and read its tensors later. Of a run that goes on, the latest
    checkpoint may be removed between the look-up and the lock; then the next latest is taken.

    Args:
        path: a checkpoint directory or one iteration in it.
        base: for a checkpoint with only trained weights, where the others are (`--base-checkpoint`).
        to_the_end: see `being_read`.

    Yields:
        The iteration directory, which stays the same whatever the run goes on to.

    Raises:
        RemovedCheckpoint: the run that wrote it has removed or replaced it.
        UserError: there is no checkpoint, its card cannot be read, or what it builds on is not there.
    """
    with contextlib.ExitStack() as locks:
        directory = resolve_checkpoint(path, base)
        for _ in range(LOOK_UPS):
            try:
                locks.enter_context(being_read(directory.path, to_the_end))
                break
            except RemovedCheckpoint:
                newer = resolve_checkpoint(path, base)
                if newer.path == directory.path:
                    raise
                directory = newer
        _keep(directory, locks)
        yield directory.path


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
