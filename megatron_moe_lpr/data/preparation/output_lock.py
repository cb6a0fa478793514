"""One writer for each dataset: two runs with one prefix would each finish, and one output would be lost."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.file_lock import LockedError, file_lock
from megatron_moe_lpr.files.work_directory import clear_left


@contextlib.contextmanager
def output_lock(prefix: str) -> Iterator[None]:
    """Hold `prefix` for this process until the block ends. The system frees it where the process dies.

    What a killed run left half exchanged is put in order first. On a file system without locks `publish` alone refuses
    what has appeared meanwhile.

    Raises:
        UserError: another run writes it now; the message says which.
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
