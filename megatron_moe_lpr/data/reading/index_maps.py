"""Check cached index maps before megatron-core loads them with `allow_pickle=True`."""

import sys
from pathlib import Path

import numpy as np

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import verify


def are_intact(directory: Path) -> bool:
    """Return whether the cached index maps exist and match their checksums; damaged ones can be rebuilt from the data.

    Prints to standard error what is wrong with existing ones.
    """
    if not directory.is_dir():
        return False
    try:
        refuse_pickles(directory)
        if verify(directory):
            return True
        reason = f"{directory}: an older version wrote these index maps, without checksums"
    except UserError as error:
        reason = str(error)
    print(f"warning: {reason}; the index maps are built again", file=sys.stderr, flush=True)
    return False


def refuse_pickles(directory: Path) -> None:
    """Check that every map is an array of integers, so that numpy unpickles nothing. Reads the headers only.

    Raises:
        UserError: a file holds anything else.
    """
    for path in sorted(directory.glob("*.npy")):
        try:
            kind = np.load(path, mmap_mode="r", allow_pickle=False).dtype.kind
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path}: not an index map ({error}); remove {directory}") from None
        if kind not in "iu":
            raise UserError(f"{path}: not an index map of integers; remove {directory}")
