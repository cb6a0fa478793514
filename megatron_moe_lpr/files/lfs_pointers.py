"""Git LFS pointers: small texts that stand where a clone without `git lfs` should have large files."""

from pathlib import Path

from megatron_moe_lpr.errors import UserError

POINTER_START = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path, data: bytes) -> None:
    """Refuse a pointer by what is to be done about it.

    Args:
        path: the file, for the message.
        data: its beginning.

    Raises:
        UserError: `data` begins as a pointer does.
    """
    if data.startswith(POINTER_START):
        raise UserError(
            f"{path}: is a Git LFS pointer, not the file itself; run `git lfs install` and `git lfs pull` in that "
            "clone, or download the model with `hf download`"
        )


def refuse_lfs_pointers(directory: Path, patterns: tuple[str, ...]) -> None:
    """Refuse a directory in which a file of one of these patterns is a pointer.

    Raises:
        UserError: naming the file.
    """
    for path in sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}):
        with open(path, "rb") as stream:
            refuse_lfs_pointer(path, stream.read(len(POINTER_START)))
