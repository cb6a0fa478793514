"""Output files that appear whole or not at all, and checks of an output path before the work begins."""

import contextlib
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_moe_lpr.errors import UserError, name_file_in_oserror
from megatron_moe_lpr.files.fsync import sync_directory, sync_file
from megatron_moe_lpr.files.mounts import is_mount_point

OPEN_FILES = ("/dev/std", "/dev/fd/", "/proc/")


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` that replaces it when the block ends without an error, and is removed otherwise.

    The content is on the disk before the rename, and so is the rename when this returns (fsync). The new file gets the
    permissions of the one that it replaces. A symbolic link is kept and the file that it points to is replaced. A
    target that cannot be replaced (a pipe, a mounted file, a file whose directory is not writable) is written over at
    the end instead.
    """
    path = Path(target)
    in_place = _must_stay(path)
    path = path if in_place else real_target(path, may_be_missing=True)
    place = Path(tempfile.gettempdir()) if in_place else path.parent
    partial = place / f".{path.name}.partial-{os.getpid()}"
    try:
        yield partial
        sync_file(partial)
        if in_place:
            _write_over(partial, path)
        else:
            with contextlib.suppress(OSError):  # a new file, or a file system without permissions
                os.chmod(partial, path.stat().st_mode & 0o7777)
            os.replace(partial, path)
            sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def append_whole(path: Path, data: bytes) -> None:
    """Append to a file, all or nothing.

    Raises:
        OSError: naming the file, for example because the disk is full; the file is as it was before.
    """
    with name_file_in_oserror(path), open(path, "ab", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        try:
            view = memoryview(data)
            while view:
                view = view[stream.write(view) :]
        except OSError:
            os.ftruncate(stream.fileno(), size)
            raise


def check_output_file(path: Path, flag: str, inputs: Iterable[Path] = ()) -> None:
    """Check before the work begins that `atomic_file` will be able to write; report what killed runs left.

    Args:
        inputs: files that the command reads.

    Raises:
        UserError: the path is a directory or an input, its directory is missing, or it is not writable.
    """
    path = Path(path)
    for one in inputs:
        if is_same_file(one, path):
            raise UserError(f"{flag} {path}: is an input, {one}, which it would replace; choose another file")
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a directory; give a file")
    if not _is_special(path):
        real = real_target(path, may_be_missing=True)
        if not real.parent.is_dir():
            raise UserError(f"{flag} {path}: there is no directory {real.parent}")
        if not os.access(real.parent, os.W_OK | os.X_OK) and not (real.exists() and os.access(real, os.W_OK)):
            raise UserError(f"{flag} {path}: {real.parent} cannot be written to; choose another place")
        for left in sorted(real.parent.glob(f".{glob.escape(real.name)}.partial-*")):
            print(f"note: {left}: a run left it that was killed or still runs", file=sys.stderr, flush=True)
    elif not os.access(path, os.W_OK):
        raise UserError(f"{flag} {path}: cannot be written to; choose another place")


def real_target(path: Path, may_be_missing: bool = False) -> Path:
    """The absolute path that an output path means, with every symbolic link followed.

    Args:
        may_be_missing: the last link may point to a file that does not exist yet.

    Raises:
        UserError: a link points to nothing, for example because its disk is not mounted, or links form a circle.
    """
    absolute = Path(path).absolute()
    for place in (absolute, *absolute.parents):
        if place.is_symlink() and not place.exists() and not (may_be_missing and place == absolute):
            raise UserError(
                f"{path}: {place} is a symbolic link to {os.readlink(place)}, which does not exist; make it, mount its "
                "disk, or remove the link"
            )
    real = Path(os.path.realpath(absolute))
    if real.is_symlink():
        raise UserError(f"{path}: symbolic links lead in a circle; remove them")
    return real


def is_same_file(first: Path, second: Path) -> bool:
    """Whether two paths are the same file; False where one of them does not exist."""
    return os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)


def _must_stay(path: Path) -> bool:
    """Whether a file can be written to, but not replaced by another file."""
    if _is_special(path):
        return True
    real = Path(os.path.realpath(path))
    return real.is_file() and (is_mount_point(real) or not os.access(real.parent, os.W_OK | os.X_OK))


def _is_special(path: Path) -> bool:
    """Whether a path is a pipe, a device, or an open file of this process such as /dev/stdout."""
    if str(path).startswith(OPEN_FILES):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def _write_over(source: Path, target: Path) -> None:
    """Copy the content of `source` into `target`, whose old content is put back if that fails."""
    if _is_special(target):
        with open(source, "rb") as content, open(target, "ab", buffering=0) as stream:
            shutil.copyfileobj(content, stream)
        return
    before = target.read_bytes()
    try:
        target.write_bytes(source.read_bytes())
        sync_file(target)
    except OSError:
        target.write_bytes(before)
        raise
