"""Detects Git LFS pointers: small text files that a clone without `git lfs` has in place of large files."""

from pathlib import Path

from megatron_moe_lpr.errors import UserError

POINTER_START = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path, data: bytes) -> None:
    """Check that a file is not a Git LFS pointer.

    Args:
        path: the file, for the message.
        data: the beginning of its content.

    Raises:
        UserError: it is a pointer; the message says how to get the file.
    """
    if data.startswith(POINTER_START):
        raise UserError(
            f"{path}: is a Git LFS pointer, not the file itself; run `git lfs install` and `git lfs pull` in that "
            "clone, or download the model with `hf download`"
        )


def refuse_lfs_pointers(directory: Path, patterns: tuple[str, ...]) -> None:
    """Check that no file of a directory that matches one of the patterns is a Git LFS pointer.

    Raises:
        UserError: naming the pointer.
    """
    for path in sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}):
        with open(path, "rb") as stream:
            refuse_lfs_pointer(path, stream.read(len(POINTER_START)))
