"""Move a finished dataset (a manifest and the files it describes) into place; an old one is replaced as a whole."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_moe_lpr.data.manifest import (
    FILES,
    Manifest,
    bin_path,
    idx_path,
    loss_mask_path,
    manifest_path,
)
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.atomic_file import real_target
from megatron_moe_lpr.files.checksums import sha256_of_file
from megatron_moe_lpr.files.entry_exchange import CONTENT, exchange_entries
from megatron_moe_lpr.files.mounts import is_mount_point
from megatron_moe_lpr.files.work_directory import unique_work_directory


@contextlib.contextmanager
def partial_directory(output_prefix: str) -> Iterator[Path]:
    """Yield a work directory beside the output, removed at the end in all cases; cleans up after killed runs first."""
    parent = real_target(Path(output_prefix).parent)
    parent.mkdir(parents=True, exist_ok=True)
    with unique_work_directory(parent, Path(output_prefix).name) as directory:
        yield directory


def refuse_existing(prefix: str, overwrite: bool) -> None:
    """Raise UserError if `prefix` holds a dataset and `overwrite` is off, or holds something that is not a dataset."""
    for path in (place(prefix) for place in FILES):
        if path.is_symlink():
            raise UserError(f"{path}: is a symbolic link; remove it, or choose another --output-prefix")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: exists and is not a file; choose another --output-prefix")
        if path.exists() and is_mount_point(path.absolute()):
            raise UserError(f"{path}: is mounted and cannot be replaced; mount its directory, or choose another prefix")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists; choose another --output-prefix or pass --overwrite")


def publish(partial: str, prefix: str, manifest: Manifest) -> Manifest:
    """Move finished files to `prefix` and a manifest with their sizes, the last of all.

    An existing dataset stays complete until the first rename. If a rename fails it is restored at once; after a kill
    between renames, the next run that takes the `output_lock` of this prefix restores it.
    """
    manifest = dataclasses.replace(
        manifest,
        bin_bytes=bin_path(partial).stat().st_size,
        idx_bytes=idx_path(partial).stat().st_size,
        index_sha256=sha256_of_file(idx_path(partial)),
    )
    target, name = Path(prefix).parent, Path(prefix).name
    # The loss mask of an old dataset of conversations goes too, if the new one is plain text.
    present = [place(prefix).name for place in FILES if place(prefix).exists()]
    with unique_work_directory(target, name) as work:
        complete = str(work / CONTENT / name)
        (work / CONTENT).mkdir()
        for place in (bin_path, idx_path, *((loss_mask_path,) if manifest.chat else ())):
            os.rename(place(partial), place(complete))
        manifest.write(complete)
        exchange_entries(work, target, present, [manifest_path(prefix).name])
    return manifest
