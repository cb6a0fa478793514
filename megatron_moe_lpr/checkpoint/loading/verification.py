"""Checks of a checkpoint before its content is used, by one process or divided among all ranks."""

import socket
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_moe_lpr.checkpoint.format.chain import checkpoint_chain
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory, resolve_checkpoint
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksum_file import CHECKSUM_FILE, verify
from megatron_moe_lpr.files.checksums import checksum_of_file, sha256_of_file
from megatron_moe_lpr.files.links import tree_inside
from megatron_moe_lpr.parallel.every_rank import first_on_any_rank, on_every_rank, on_rank_0


def open_checkpoint(
    path: Path, verified: bool = True, parent: Path | None = None, tensor_sizes: bool = True
) -> CheckpointDirectory:
    """Find the checkpoint that `path` means and verify its small files: index, card, configuration, tokenizer.

    Args:
        verified: False: only find it (`--no-verify`).
        parent: for a checkpoint with only trained weights, where the others are (`--base-checkpoint`).
        tensor_sizes: compare the sizes of the tensor files too; False: the caller's ranks will, by `verify_all`.

    Raises:
        UserError: there is no checkpoint, an incomplete one, a damaged file, or a symbolic link among the small files
            that leads out of the checkpoint.
    """
    directory = resolve_checkpoint(path, parent)
    for checkpoint in checkpoint_chain(directory):
        tree_inside(checkpoint.side_directory, checkpoint.path)
        if verified:
            verify_small_files(checkpoint, tensor_sizes)
    return directory


def verify_small_files(directory: CheckpointDirectory, tensor_sizes: bool = True) -> bool:
    """Compare all but the tensor files with the checksum file, and the tokenizer with the card.

    Args:
        tensor_sizes: compare the sizes of the tensor files too.

    Returns:
        False: there is no checksum file.

    Raises:
        UserError: naming the damaged file.
    """
    found = verify(directory.path, small_only=True, tensor_sizes=tensor_sizes)
    for name, expected in directory.card().tokenizer_files.items():
        path = directory.side_directory / name
        if not path.is_file() or sha256_of_file(path) != expected:
            state = "not the file" if path.is_file() else "missing, though it is one"
            raise UserError(f"{path}: {state} that the card was written with; copy it from the dense model again")
    return found


def verify_all(directory: Path) -> None:
    """Compare every file with the checksum file. Without a checksum file: print a warning.

    With process groups the files are divided among the ranks, and every rank must call it.

    Raises:
        DamagedFile: on every rank, naming a damaged file.
        UserError: on every rank: a rank cannot read its files, or sees other files than the rest.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    has_checksums = on_every_rank(lambda: verify(directory, rank, world_size))
    if not has_checksums and rank == 0:
        warn(
            f"{directory}: no {CHECKSUM_FILE}: an older version wrote this checkpoint; it is used without verification"
        )


def check_same_on_all_ranks(directory: Path) -> None:
    """Check that every rank sees the same checkpoint. Every rank must call it.

    Ranks that each looked up the latest checkpoint of a run in progress may have found two different ones, and a node
    may have another file system mounted.

    Raises:
        UserError: on every rank, naming the rank that sees another checkpoint.
    """
    checksum = on_every_rank(lambda: _hash_checksum_file(directory))
    host = socket.gethostname()
    reference_host, reference, expected = on_rank_0(lambda: (host, directory, checksum))
    # Another directory name: the run that is being read has saved a newer checkpoint meanwhile.
    moved_on = directory.name != reference.name
    differs = checksum != expected or (checksum is None and moved_on)
    if found := first_on_any_rank((host, directory, checksum, moved_on) if differs else None):
        rank, (host, path, checksum, moved_on) = found
        state = "differs from" if checksum else f"has no {CHECKSUM_FILE.name}, unlike"
        advice = "its run goes on: name one iteration directory" if moved_on else "all nodes must see the same files"
        raise UserError(
            f"rank {rank} on {host} reads {path}, which {state} {reference}, as rank 0 on {reference_host} reads "
            f"it; {advice}"
        )


def _hash_checksum_file(directory: Path) -> str | None:
    path = directory / CHECKSUM_FILE
    return checksum_of_file(path).checksum if path.is_file() else None


def warn(message: str) -> None:
    """Print a warning, one line on standard error."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
