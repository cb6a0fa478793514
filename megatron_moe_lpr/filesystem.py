"""Output that appears whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_moe_lpr.errors import UserError


@contextlib.contextmanager
def atomic_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty sibling directory that becomes `target` when the block ends without an error.

    An existing `target` stays untouched until then. On any error, Ctrl-C included, the sibling is removed.

    Raises:
        UserError: `target` exists, is not an empty directory, and `overwrite` is off.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: exists and is not a directory")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"{target}: exists and is not empty; choose another directory or pass --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _replace_directory(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_directory(source: Path, target: Path) -> None:
    if not target.exists():
        os.rename(source, target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a sibling path that replaces `target` when the block ends without an error, and is removed otherwise."""
    target = Path(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
