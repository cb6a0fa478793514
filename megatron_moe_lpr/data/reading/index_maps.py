"""The kept index maps of training datasets: looked at before megatron-core reads them, pickles allowed."""

import sys
from pathlib import Path

import numpy as np

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import verify


def are_intact(directory: Path) -> bool:
    """Whether the maps are there as they were written. They follow from the data, so damaged ones are built again.

    A warning on standard error says what is wrong with those that are there.
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
    """Check that every map is an array of integers, which numpy reads without unpickling. Cheap: reads the headers.

    Raises:
        UserError: one is not.
    """
    for path in sorted(directory.glob("*.npy")):
        try:
            kind = np.load(path, mmap_mode="r", allow_pickle=False).dtype.kind
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path}: not an index map ({error}); remove {directory}") from None
        if kind not in "iu":
            raise UserError(f"{path}: not an index map of integers; remove {directory}")
