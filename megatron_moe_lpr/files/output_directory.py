"""A directory as output: it appears whole or not at all, and nothing that was not there at the start is replaced."""

import contextlib
import dataclasses
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.filesystem import real_target, sync_directory, sync_tree
from megatron_moe_lpr.files.mounts import is_mount_point, mount_points_below
from megatron_moe_lpr.files.moving_in import CONTENT, OLD, move_in
from megatron_moe_lpr.files.renaming import exchange, rename_without_replacing
from megatron_moe_lpr.files.work_directory import free_name, give_back, work_directory

# The file system's own, at the root of a volume.
NOT_CONTENT = ("lost+found",)
# What a rename says of a directory that has to stay where it is.
_MUST_STAY = (errno.EBUSY, errno.EXDEV)

Entries = dict[str, tuple[int, int, int]]
"""Path below a directory to kind and mode, size and time of change in nanoseconds."""


@contextlib.contextmanager
def atomic_directory(target: Path, overwrite: bool = False, last: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty directory on the disk of `target` that becomes `target` when the block ends without an error.

    An existing `target` stays untouched until then; the two change places in one step where the system can do that, and
    otherwise the old one is put back if anything fails. A symbolic link stays, what it leads to is the target. A
    directory that cannot be renamed (a mount point, the working directory, one whose parent cannot be written to) is
    filled in place, which is said at the start. On any error, Ctrl-C included, what was written is removed; but if all
    was written and only the target cannot be had, it is kept beside the target under a name that the error says.
    What is in the directory is on the disk before it gets its name (fsync), and so is the name when this returns.

    Args:
        overwrite: replace what is in `target` now. What appears or changes there during the block is never replaced.
        last: names of entries by which a reader knows that the directory is complete.

    Raises:
        UserError: `target` exists, is not an empty directory, and `overwrite` is off; another run is writing it; it has
            changed during the block.
        OSError: naming `target`: it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        output = _open(Path(target), overwrite, stack)
        if output.in_place:
            _say_in_place(output, last)
        output.content.mkdir()
        yield output.content
        sync_tree(output.content)
        try:
            output.publish(last)
        except (OSError, UserError) as error:
            raise output.kept(error) from error
        sync_directory(output.path.parent)


@dataclasses.dataclass(frozen=True)
class _Output:
    target: Path
    """As the user wrote it."""
    path: Path
    """The directory itself: absolute, without symbolic links."""
    work: Path
    in_place: str | None
    """Why the directory cannot be renamed."""
    status: os.stat_result | None
    """Of the directory at the start; None: there was none."""
    entries: Entries
    """Everything in it at the start."""

    @property
    def content(self) -> Path:
        return self.work / CONTENT

    def publish(self, last: Sequence[str]) -> None:
        """Give the content its name. Raises UserError or OSError, and nothing has changed then."""
        if self.status is None:
            rename_without_replacing(self.content, self.path)
        elif self.in_place:
            self._move_in(last)
        else:
            self._check_unchanged(self.path)
            try:
                self._replace()
            except OSError as error:
                if error.errno not in _MUST_STAY:
                    raise
                self._move_in(last)
            self._restore_owner(self.status)

    def _replace(self) -> None:
        if not self.entries:
            # Of itself this replaces nothing but an empty directory.
            os.rename(self.content, self.path)
        elif exchange(self.content, self.path):
            self._check_or_undo()
        else:
            # A kill between the two leaves `old`, which the next run puts back (`work_directory.settle`).
            os.rename(self.path, self.work / OLD)
            try:
                self._check_unchanged(self.work / OLD)
                os.rename(self.content, self.path)
            except BaseException:
                rename_without_replacing(self.work / OLD, self.path)
                raise

    def _check_or_undo(self) -> None:
        try:
            self._check_unchanged(self.content)
        except UserError:
            exchange(self.content, self.path)
            raise

    def _move_in(self, last: Sequence[str]) -> None:
        self._check_unchanged(self.path)
        move_in(self.work, self.path, _names(self.path, self.work), last)

    def _check_unchanged(self, place: Path) -> None:
        """Compare what is at `place` with what was at the target when this began."""
        try:
            is_same = self.status is not None and os.path.samestat(os.stat(place), self.status)
        except FileNotFoundError:
            raise UserError(f"{self.target}: has been removed or renamed while this ran") from None
        if not is_same:
            raise UserError(f"{self.target}: has become another directory while this ran")
        entries = _entries(place, self.work)
        changed = sorted(name for name in entries.keys() | self.entries.keys() if _differ(name, entries, self.entries))
        if changed:
            raise UserError(f"{self.target}: changed while this ran, as {changed[0]} in it did")

    def _restore_owner(self, status: os.stat_result) -> None:
        with contextlib.suppress(OSError):
            os.chown(self.path, status.st_uid, status.st_gid)
        with contextlib.suppress(OSError):
            os.chmod(self.path, status.st_mode & 0o7777)

    def kept(self, error: OSError | UserError) -> UserError:
        """The error of an output that is complete and could not get its name: it keeps one that is free."""
        if isinstance(error, FileExistsError):
            reason = f"{self.target}: appeared while this ran"
        else:
            reason = str(error) if isinstance(error, UserError) else f"{self.target}: {error.strerror or error}"
        try:
            give_back(self.work, self.path)
            place = free_name(self.work.parent / f"{self.path.name or 'output'}.finished")
            rename_without_replacing(self.content, place)
        except OSError:
            left = f"; {self.work} keeps what belongs there" if (self.work / OLD).exists() else ""
            return UserError(f"{reason}{left}")
        return UserError(f"{reason}; it was left as it is, and what this command wrote is complete in {place}")


def _open(target: Path, overwrite: bool, stack: contextlib.ExitStack) -> _Output:
    """Decide how the target can be written and take it. Raises UserError."""
    path = real_target(target)
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{target}: exists and is not a directory")
    in_place = _why_in_place(target, path) if path.is_dir() else None
    parent = path if in_place else path.parent
    work = parent / f".{path.name or 'output'}.partial"
    if not os.path.lexists(work):
        _check_empty(target, path, work, overwrite)
    try:
        _make_parents(parent, stack)
        stack.enter_context(work_directory(work, path))
    except OSError as error:
        # The user knows the target, not the hidden directory.
        raise OSError(error.errno, error.strerror, str(target)) from None
    _check_empty(target, path, work, overwrite)
    status = os.stat(path) if path.is_dir() else None
    return _Output(target, path, work, in_place, status, _entries(path, work))


def _check_empty(target: Path, path: Path, work: Path, overwrite: bool) -> None:
    if not overwrite and path.is_dir() and _names(path, work):
        raise UserError(f"{target}: exists and is not empty; choose another directory or pass --overwrite")


def _why_in_place(target: Path, path: Path) -> str | None:
    below = mount_points_below(path)
    if below:
        raise UserError(f"{target}: a file system is mounted in it, at {below[0]}; unmount it or choose another place")
    if is_mount_point(path):
        return "is a mount point"
    if os.path.samefile(path, os.curdir):
        return "is the working directory"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return "lies in a directory that cannot be written to"
    return None


def _make_parents(directory: Path, stack: contextlib.ExitStack) -> None:
    """Make a directory and those above it; what is empty at the end goes again."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        stack.callback(_remove_empty, path)


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _say_in_place(output: _Output, last: Sequence[str]) -> None:
    order = f", {' and '.join(last)} last" if last else ""
    print(f"note: {output.target}: {output.in_place}; it will be filled in place{order}", file=sys.stderr, flush=True)


def _names(directory: Path, work: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name not in NOT_CONTENT and directory / name != work]


def _entries(directory: Path, work: Path) -> Entries:
    if not directory.is_dir():
        return {}
    entries: Entries = {}
    for parent, directories, names in os.walk(directory):
        if Path(parent) == directory:
            content = _names(directory, work)
            directories[:] = [name for name in directories if name in content]
        for name in (*directories, *names):
            path = Path(parent, name)
            found = path.lstat()
            # A directory's own time changes with its entries, which are here themselves.
            rest = (0, 0) if name in directories else (found.st_size, found.st_mtime_ns)
            entries[path.relative_to(directory).as_posix()] = (found.st_mode, *rest)
    return entries


def _differ(name: str, first: Entries, second: Entries) -> bool:
    return first.get(name) != second.get(name)
