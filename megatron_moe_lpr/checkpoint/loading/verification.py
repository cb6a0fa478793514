"""Checks of a checkpoint before anything in it is used, by one process or shared among all ranks."""

import socket
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory, resolve_checkpoint
from megatron_moe_lpr.checkpoint.format.trainable_only import layers_of
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import MANIFEST, checksum_of_file, verify
from megatron_moe_lpr.files.filesystem import sha256_of_file
from megatron_moe_lpr.files.links import tree_inside
from megatron_moe_lpr.parallel.every_rank import on_every_rank


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
        DamagedFile: on every rank, naming a damaged file.
        UserError: on every rank: a rank cannot read its share, or has other files before it.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    has_manifest = on_every_rank(lambda: verify(directory, rank, world_size))[rank]
    if not has_manifest and rank == 0:
        warn(f"{directory}: no {MANIFEST}: an older version wrote this checkpoint; it is used without verification")


def check_same_on_all_ranks(directory: Path) -> None:
    """Check that every rank has the same checkpoint before it. Every rank must call it.

    Ranks that each looked up the latest of a run that goes on may have found two; a node may lack the file system.

    Raises:
        UserError: on every rank, naming the rank that has another one.
    """
    found = on_every_rank(lambda: (socket.gethostname(), directory, _manifest_checksum(directory)))
    reference_host, reference, expected = found[0]
    for rank, (host, path, checksum) in enumerate(found):
        moved_on = path.name != reference.name
        if checksum != expected or (checksum is None and moved_on):
            state = "differs from" if checksum else f"has no {MANIFEST.name}, unlike"
            advice = (
                "its run goes on: name one iteration directory" if moved_on else "all nodes must see the same files"
            )
            raise UserError(
                f"rank {rank} on {host} reads {path}, which {state} {reference}, as rank 0 on {reference_host} reads "
                f"it; {advice}"
            )


def _manifest_checksum(directory: Path) -> str | None:
    path = directory / MANIFEST
    return checksum_of_file(path).checksum if path.is_file() else None


def warn(message: str) -> None:
    """One line on standard error."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
