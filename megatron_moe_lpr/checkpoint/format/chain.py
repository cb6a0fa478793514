"""Checkpoint chains: a checkpoint of only trained weights (`--save-trainable-only`) and its parent checkpoints.

The parent checkpoint holds the weights that its child leaves out. It may itself have a parent.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash

from megatron_moe_lpr.checkpoint.format.card import ParentCheckpoint
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory, resolve_checkpoint
from megatron_moe_lpr.checkpoint.format.reader import CheckpointReader, TensorInfo, is_model_key
from megatron_moe_lpr.checkpoint.format.retention import RemovedCheckpoint, hold_checkpoint
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksum_file import read_checksums
from megatron_moe_lpr.files.checksums import checksum_of_file
from megatron_moe_lpr.model.configuration.parameter_kinds import kind_of

MAX_LOOK_UPS = 5
"""How often `resolve_and_hold` looks up the latest checkpoint of a run that meanwhile removes older ones."""


def checkpoint_chain(directory: CheckpointDirectory) -> list[CheckpointDirectory]:
    """The checkpoint and its parents, oldest first. The oldest holds all weights; later ones replace some of them.

    Raises:
        UserError: a parent is not where the card or --base-checkpoint says, or is another checkpoint.
    """
    parent = find_parent(directory)
    return [directory] if parent is None else [*checkpoint_chain(parent), directory]


def find_parent(directory: CheckpointDirectory) -> CheckpointDirectory | None:
    """The parent checkpoint, checked against the card of `directory`; None: `directory` holds all weights.

    Raises:
        UserError: the parent is not where the card or --base-checkpoint says, or is another checkpoint.
    """
    card = directory.card()
    if card.parent is None:
        if directory.parent_path is not None:
            raise UserError(
                f"--base-checkpoint {directory.parent_path}: {directory.path} holds all weights; leave it out"
            )
        return None
    parent = _locate_parent(directory)
    _check_parent(directory, card.parent, parent)
    return parent


def _locate_parent(directory: CheckpointDirectory) -> CheckpointDirectory:
    """Find the parent of a checkpoint that has one, without comparing it with the card."""
    recorded = directory.card().parent
    path = directory.parent_path or Path(recorded.path if recorded else "")
    if not path.is_dir():
        raise UserError(
            f"{directory.path}: holds only the weights that were trained, and {path}, where the others are, does not "
            "exist; say with --base-checkpoint where it is now"
        )
    return resolve_checkpoint(path)


def _check_parent(directory: CheckpointDirectory, recorded: ParentCheckpoint, parent: CheckpointDirectory) -> None:
    card, parent_card = directory.card(), parent.card()
    problem = None
    if parent_card.original_fingerprint != card.original_fingerprint:
        problem = "its original weights are others (fingerprint)"
    elif (parent_card.experts_per_layer, parent_card.expansions) != (card.experts_per_layer, card.expansions):
        problem = "its layers have other numbers of experts"
    elif parent_card.inserted_blocks != card.inserted_blocks:
        problem = "its inserted blocks are others"
    elif parent_card.new_tokens != card.new_tokens:
        problem = "its vocabulary has other new tokens"
    elif weights_checksum(parent) != recorded.checksum and not _needs_only_dense_weights(directory, parent):
        problem = "its weights are others (checksum)"
    if problem:
        raise UserError(
            f"{parent.path}: not the base of {directory.path}: {problem}; it was trained from {recorded.path}, give "
            "that one with --base-checkpoint"
        )


def _needs_only_dense_weights(directory: CheckpointDirectory, parent: CheckpointDirectory) -> bool:
    """Whether `parent` is a converted model of which `directory` needs only the dense model's weights.

    The fingerprint identifies those weights; how the converter distributed them over files does not matter.
    """
    if parent.card().history or parent.card().parent:
        return False
    needed = set(CheckpointReader(parent.path).tensors) - set(CheckpointReader(directory.path).tensors)
    card = directory.card()
    kinds = (kind_of(key, card.inserted_blocks, len(card.new_tokens)) for key in needed if is_model_key(key))
    return all(kind.is_original for kind in kinds)


def record_parent(directory: CheckpointDirectory) -> ParentCheckpoint:
    """What the card of a checkpoint with only trained weights records about its parent `directory`."""
    return ParentCheckpoint(str(directory.path), weights_checksum(directory))


def weights_checksum(directory: CheckpointDirectory) -> str:
    """xxh3_128 over the recorded checksums of all tensor files; without a checksum file, the tensor files are read.

    Raises:
        UserError: the checksum file is damaged.
    """
    files = read_checksums(directory.path)
    if files is None:
        files = {path.name: checksum_of_file(path) for path in directory.path.glob("*.distcp")}
    digest = xxhash.xxh3_128()
    for name in sorted(name for name in files if name.endswith(".distcp")):
        digest.update(f"{name} {files[name].bytes} {files[name].checksum}\n".encode())
    parent = directory.card().parent
    if parent:
        digest.update(parent.checksum.encode())
    return digest.hexdigest()


@contextlib.contextmanager
def hold_chain(directory: CheckpointDirectory) -> Iterator[list[CheckpointDirectory]]:
    """Keep runs from removing a checkpoint or its parents while the block runs; yields its `checkpoint_chain`."""
    with contextlib.ExitStack() as locks:
        _hold_with_parents(directory, locks)
        yield checkpoint_chain(directory)


def _hold_with_parents(directory: CheckpointDirectory, locks: contextlib.ExitStack) -> None:
    """Lock a checkpoint before anything in it is read, then the parents that its card names."""
    locks.enter_context(hold_checkpoint(directory.path))
    if directory.card().parent is not None:
        _hold_with_parents(_locate_parent(directory), locks)


@contextlib.contextmanager
def resolve_and_hold(path: Path, parent: Path | None = None, check_at_end: bool = True) -> Iterator[Path]:
    """Find the checkpoint that `path` means; while the block runs, no run removes it or its parents.

    For commands that first read a checkpoint's small files and later its tensors. A run in progress may remove its
    latest checkpoint between the look-up and the lock; the look-up is then repeated.

    Args:
        path: a checkpoint directory or one iteration in it.
        parent: for a checkpoint with only trained weights, where the others are (`--base-checkpoint`).
        check_at_end: see `hold_checkpoint`.

    Yields:
        The iteration directory, which stays the same when the run writes newer ones.

    Raises:
        RemovedCheckpoint: the run that wrote it has removed or replaced it.
        UserError: there is no checkpoint, its card cannot be read, or a parent is missing.
    """
    with contextlib.ExitStack() as locks:
        directory = resolve_checkpoint(path, parent)
        for _ in range(MAX_LOOK_UPS):
            try:
                locks.enter_context(hold_checkpoint(directory.path, check_at_end))
                break
            except RemovedCheckpoint:
                newer = resolve_checkpoint(path, parent)
                if newer.path == directory.path:
                    raise
                directory = newer
        _hold_with_parents(directory, locks)
        yield directory.path


class ChainReader:
    """Reads like CheckpointReader, each tensor from the newest checkpoint of a chain that holds it."""

    def __init__(self, directories: list[CheckpointDirectory]) -> None:
        """Read the indexes of a chain, oldest checkpoint first."""
        self.directory = directories[-1].path
        readers = [CheckpointReader(directory.path) for directory in directories]
        self.sources = {key: reader for reader in readers for key in reader.tensors}
        self.tensors: dict[str, TensorInfo] = {key: reader.tensors[key] for key, reader in self.sources.items()}

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, see `CheckpointReader.read`."""
        if key not in self.sources:
            raise UserError(f"{self.directory}: the checkpoint has no tensor {key}")
        return self.sources[key].read(key)


TensorReader = CheckpointReader | ChainReader


def open_reader(directory: CheckpointDirectory) -> TensorReader:
    """Reader of all tensors of a checkpoint and its parents.

    Raises:
        UserError: a parent is missing or another checkpoint, or an index is missing or damaged.
    """
    chain = checkpoint_chain(directory)
    return CheckpointReader(directory.path) if len(chain) == 1 else ChainReader(chain)
