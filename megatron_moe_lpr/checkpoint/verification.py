"""Checks of a checkpoint before anything in it is used, by one process or shared among all ranks."""

import sys
from pathlib import Path

import torch.distributed as dist

from megatron_moe_lpr.checkpoint.directory import CheckpointDirectory, resolve_checkpoint
from megatron_moe_lpr.checkpoint.integrity import MANIFEST, verify
from megatron_moe_lpr.checkpoint.trainable_only import layers_of
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.filesystem import sha256_of_file
from megatron_moe_lpr.links import tree_inside


def open_checkpoint(path: Path, verified: bool = True, base: Path | None = None) -> CheckpointDirectory:
    """Find the checkpoint that `path` means and compare its small files: index, card, configuration, tokenizer.

    Args:
        verified: False: only find it (`--no-verify`).
        base: for a checkpoint with only trained weights, where the others are (`--base-checkpoint`).

    Raises:
        UserError: there is no checkpoint, an incomplete one, a damaged file, or a symbolic link among the small files
            that leads out of the checkpoint.
    """
    directory = resolve_checkpoint(path, base)
    for layer in layers_of(directory):
        tree_inside(layer.side_directory, layer.path)
        if verified:
            verify_small_files(layer)
    return directory


def verify_small_files(directory: CheckpointDirectory) -> bool:
    """Compare all but the tensors with the manifest, and the tokenizer with the card. False: there is no manifest.

    Raises:
        UserError: naming the damaged file.
    """
    found = verify(directory.path, small_only=True)
    for name, expected in directory.card().tokenizer_files.items():
        path = directory.side_directory / name
        if not path.is_file() or sha256_of_file(path) != expected:
            state = "not the file" if path.is_file() else "missing, though it is one"
            raise UserError(f"{path}: {state} that the card was written with; copy it from the dense model again")
    return found


def verify_all(directory: Path) -> None:
    """Compare every file; with process groups each rank takes a share and every rank must call it.

    A checkpoint without a manifest passes with a warning.

    Raises:
        UserError: on every rank, naming a damaged file.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    error, has_manifest = None, True
    try:
        has_manifest = verify(directory, rank, world_size)
    except (UserError, OSError) as caught:
        error = str(caught)
    for reason in _of_all_ranks(error):
        if reason:
            raise UserError(reason)
    if not has_manifest and rank == 0:
        warn(f"{directory}: no {MANIFEST}: an older version wrote this checkpoint; it is used without verification")


def warn(message: str) -> None:
    """One line on standard error."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _of_all_ranks(value: str | None) -> list[str | None]:
    if not dist.is_initialized():
        return [value]
    values: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
