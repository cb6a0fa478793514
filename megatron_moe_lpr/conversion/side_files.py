"""Checks of the directory that a conversion writes, and JSON files in Hugging Face's style."""

import os
import shutil
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files import json_files


def check_separate(source: Path, source_flag: str, target: Path, target_flag: str) -> None:
    """Refuse a target that is the source, lies in it or contains it: overwriting it would destroy the source.

    Raises:
        UserError: naming both flags.
    """
    first, second = _identities(source), _identities(target)
    if first[0] in second or second[0] in first:
        raise UserError(f"{target_flag} {target}: must lie apart from {source_flag} {source}")


def _identities(path: Path) -> list[tuple[int, int] | Path]:
    """Identities of a path and of all directories above it: device and inode, which are the same through a bind mount,
    or the path itself where nothing exists."""
    real = Path(os.path.realpath(path))
    found: list[tuple[int, int] | Path] = []
    for place in (real, *real.parents):
        status = place.stat() if place.exists() else None
        found.append((status.st_dev, status.st_ino) if status else place)
    return found


def check_disk_space(directory: Path, num_bytes: int, target: Path) -> None:
    """Check for free space before an hour of work.

    Args:
        directory: an existing directory on the disk.
        target: the path that the message names.

    Raises:
        UserError: naming how much is needed and how much is free.
    """
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise UserError(
            f"{target}: no space left on device: {num_bytes / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free"
        )


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON object as Hugging Face does: sorted, indented."""
    json_files.write_json(content, path, sort_keys=True)
