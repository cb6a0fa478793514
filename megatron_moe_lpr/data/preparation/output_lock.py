"""Lock a dataset prefix, so that two preprocessing runs never write the same dataset."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.file_lock import LockedError, file_lock
from megatron_moe_lpr.files.work_directory import clear_left


@contextlib.contextmanager
def output_lock(prefix: str) -> Iterator[None]:
    """Hold the lock of `prefix` during the block; the operating system releases it if the process dies.

    A half-finished replacement of a killed run is completed or undone first. On a file system without locks only
    `publish` detects another writer, by files that have appeared in the meantime.

    Raises:
        UserError: another run holds the lock; the message names its process and host.
    """
    path = Path(prefix).with_name(f".{Path(prefix).name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(path))
        except LockedError as owner:
            raise UserError(
                f"--output-prefix {prefix}: another run writes it now ({owner}); wait for it, or choose another prefix"
            ) from None
        clear_left(path.parent, Path(prefix).name)
        yield
