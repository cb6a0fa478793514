"""Symbolic links in directories that come from elsewhere: a link may not fetch what was not part of them."""

import os
import shutil
from pathlib import Path

from megatron_moe_lpr.errors import UserError

MAX_LINKS = 40
"""As many as Linux follows."""
HUB_PREFIXES = ("models--", "datasets--", "spaces--")


def file_inside(path: Path, directory: Path) -> Path:
    """The file that `path`, a path below `directory`, means: absolute, without links.

    Links may lead anywhere inside `directory`, which may itself be reached through a link. In a snapshot of the hub's
    cache (`models--ORG--NAME/snapshots/REVISION`) they may also lead to the blobs beside it, where its files lie.

    Raises:
        UserError: a link leads elsewhere, be it on a way that comes back, or to nothing; or this is a pipe or a device.
    """
    roots = _roots(Path(directory))
    current = roots[0] if Path(path) == Path(directory) else Path(path)
    for _ in range(MAX_LINKS):
        parent = Path(os.path.realpath(current.parent))
        current = parent / current.name if current.name != ".." else Path(os.path.realpath(parent / ".."))
        if not _is_inside(current, roots):
            raise UserError(
                f"{path}: a symbolic link that leads out of {directory}, to {current}; put the file itself there if it "
                "belongs to the model"
            )
        if not current.is_symlink():
            break
        current = parent / os.readlink(current)
    real = Path(os.path.realpath(path))
    if real != current or real.is_symlink() or (Path(path).is_symlink() and not real.exists()):
        raise UserError(f"{path}: a symbolic link that leads to nothing; copy the file again")
    if real.exists() and not real.is_file() and not real.is_dir():
        raise UserError(f"{path}: neither a file nor a directory; remove it")
    return real


def tree_inside(path: Path, directory: Path, above: tuple[Path, ...] = ()) -> dict[str, Path]:
    """Every file below `path`, a directory in `directory` or it itself, without links, by its path relative to `path`.

    Args:
        above: directories, without links, that `path` was found in.

    Raises:
        UserError: what `file_inside` raises of a link, or directories that hold themselves.
    """
    here = file_inside(path, directory)
    if here in above:
        raise UserError(f"{path}: a symbolic link to a directory that holds it; remove it")
    found: dict[str, Path] = {}
    for entry in sorted(os.listdir(here)):
        real = file_inside(path / entry, directory)
        if real.is_file():
            found[entry] = real
        elif real.is_dir():
            below = tree_inside(path / entry, directory, (*above, here))
            found |= {f"{entry}/{name}": file for name, file in below.items()}
    return found


def copy_private(source: Path, target: Path) -> None:
    """Copy a file's content; others may read the copy only where they may read the source, nobody may execute it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    os.chmod(target, target.stat().st_mode & (source.stat().st_mode & 0o666 | 0o600))


def _roots(directory: Path) -> list[Path]:
    real = Path(os.path.realpath(directory))
    blobs = [
        snapshots.parent / "blobs"
        for snapshots in (real, *real.parents)
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith(HUB_PREFIXES) and snapshots != real
    ]
    return [real, *blobs]


def _is_inside(path: Path, roots: list[Path]) -> bool:
    return any(root == path or root in path.parents for root in roots)
