"""Files that appear whole or not at all, and what is on the disk for certain."""

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_moe_lpr.errors import UserError, naming
from megatron_moe_lpr.files.mounts import is_mount_point
from megatron_moe_lpr.liveness import advance

OPEN_FILES = ("/dev/std", "/dev/fd/", "/proc/")


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a sibling path that replaces `target` when the block ends without an error, and is removed otherwise.

    The content is on the disk before the rename, and the rename when this returns (fsync). A symbolic link stays, what
    it leads to is replaced. What cannot be replaced (a pipe, a file that is mounted, one whose directory cannot be
    written to) is written at the end instead.
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
            os.replace(partial, path)
            sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def append_whole(path: Path, data: bytes) -> None:
    """Append to a file, all or nothing.

    Raises:
        OSError: naming the file, for example because the disk is full; the file stays as it was.
    """
    with naming(path), open(path, "ab", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        try:
            view = memoryview(data)
            while view:
                view = view[stream.write(view) :]
        except OSError:
            os.ftruncate(stream.fileno(), size)
            raise


def check_output_file(path: Path, flag: str, inputs: Iterable[Path] = ()) -> None:
    """Refuse before the work begins what `atomic_file` could not write at its end; name what killed runs left.

    Args:
        inputs: files that the command reads.

    Raises:
        UserError: a directory is in the way, there is no directory for it, it cannot be written to, or it is an input.
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
    """What an output path means: absolute, every symbolic link on the way followed.

    Args:
        may_be_missing: the last link may lead to a file that is still to be written.

    Raises:
        UserError: a link leads to nothing, as when its disk is not mounted, or links lead in a circle.
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
    """Whether two names are those of one file; a file that is not there is the same as none."""
    return os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)


def _must_stay(path: Path) -> bool:
    """Whether a file can be written but not replaced by another."""
    if _is_special(path):
        return True
    real = Path(os.path.realpath(path))
    return real.is_file() and (is_mount_point(real) or not os.access(real.parent, os.W_OK | os.X_OK))


def _is_special(path: Path) -> bool:
    """A pipe, a device, or an open file of this process such as /dev/stdout, be it a regular one."""
    if str(path).startswith(OPEN_FILES):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def _write_over(source: Path, target: Path) -> None:
    if _is_special(target):
        with open(source, "rb") as content, open(target, "ab", buffering=0) as stream:
            shutil.copyfileobj(content, stream)
        return
    # Not in one step, but a full disk costs nothing that was there.
    before = target.read_bytes()
    try:
        target.write_bytes(source.read_bytes())
        sync_file(target)
    except OSError:
        target.write_bytes(before)
        raise


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk; a power failure then cannot leave it empty under its name."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk: call it after a rename that must last."""
    _sync(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))


def sync_tree(directory: Path) -> None:
    """`sync_file` for every file below a directory, and `sync_directory` for it and every directory in it."""
    for parent, _, names in os.walk(directory):
        for name in names:
            sync_file(Path(parent, name))
            advance()
        sync_directory(Path(parent))


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(16 << 20), b""):
            digest.update(chunk)
            advance()
    return digest.hexdigest()


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems (FUSE, old NFS) know no fsync of directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
