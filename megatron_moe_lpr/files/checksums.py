"""Checksums of a checkpoint's files: made while they are written, compared when they are read.

ITERATION/moe_lpr/checksums.json    {"algorithm": "xxh3_128", "files": {relative path: {"bytes": n, "checksum": hex}}}

Every file below the iteration directory is in it, save itself. xxh3 finds damage, not intent: whoever can write the
directory can write the manifest too.
"""

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import xxhash

from megatron_moe_lpr.errors import DamagedFile, UserError, naming
from megatron_moe_lpr.files.filesystem import atomic_file, sync_tree
from megatron_moe_lpr.liveness import advance

ALGORITHM = "xxh3_128"
MANIFEST = Path("moe_lpr", "checksums.json")
BLOCK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class FileChecksum:
    """What the manifest says of one file."""

    bytes: int
    """Its size."""
    checksum: str
    """xxh3_128 of its content, in 32 hexadecimal digits."""


class OutputStream(Protocol):
    """What torch.save and the zip writer below it write to."""

    def write(self, block: Any) -> int: ...

    def tell(self) -> int: ...

    def flush(self) -> None: ...


class ChecksumStream:
    """A binary stream for writing that knows the checksum of what went through it.

    Append only: what torch.save, the zip writer below it and torch's and Megatron's checkpoint writers do with a stream
    is `write`, `tell` and `flush`. Going back would make the checksum wrong, so `seek` to anywhere but the end raises.
    An OSError of a write is kept in `error`: torch.save replaces it by a RuntimeError that does not say what happened.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        """Wrap a stream at its beginning."""
        self.raw = raw
        self.error: OSError | None = None
        self._bytes = 0
        self._digest = xxhash.xxh3_128()

    def write(self, block: Any) -> int:
        """Write a bytes-like object whole."""
        view = memoryview(block).cast("B")
        try:
            self.raw.write(view)
        except OSError as error:
            self.error = error
            raise
        self._digest.update(view)
        self._bytes += view.nbytes
        advance()
        return view.nbytes

    def tell(self) -> int:
        """Bytes written so far."""
        return self._bytes

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Stay at the end.

        Raises:
            io.UnsupportedOperation: the place is another one.
        """
        target = {os.SEEK_SET: 0, os.SEEK_CUR: self._bytes, os.SEEK_END: self._bytes}[whence] + offset
        if target != self._bytes:
            raise io.UnsupportedOperation("a stream with a checksum cannot go back")
        return target

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self.raw.flush()

    def fileno(self) -> int:
        """The file's descriptor, for fsync."""
        return self.raw.fileno()

    def close(self) -> None:
        """Flush, wait until the disk has it, and close."""
        if not self.raw.closed:
            try:
                self.raw.flush()
                os.fsync(self.raw.fileno())
            finally:
                self.raw.close()

    def entry(self) -> FileChecksum:
        """The manifest's entry of what was written so far."""
        return FileChecksum(self._bytes, self._digest.hexdigest())

    def __enter__(self) -> "ChecksumStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def checksum_of_file(path: Path) -> FileChecksum:
    """Read a file whole, in blocks, at several GB/s where it is in memory."""
    digest, size = xxhash.xxh3_128(), 0
    block = memoryview(bytearray(BLOCK_BYTES))
    with naming(path), open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            size += count
            advance()
    return FileChecksum(size, digest.hexdigest())


def write_manifest(directory: Path, entries: Mapping[str, FileChecksum]) -> None:
    """Write the manifest of a complete iteration directory and put all of it on the disk (fsync).

    Files without an entry, the small ones beside the tensors, are read once for theirs.

    Args:
        entries: by path relative to `directory`, in POSIX form: what was summed while it was written.

    Raises:
        UserError: a file that was summed is not there, or has another size.
    """
    present = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
    for name, entry in entries.items():
        if name not in present or present[name].stat().st_size != entry.bytes:
            raise UserError(f"{directory / name}: {entry.bytes:,} bytes were written, and they are not there")
    files = {name: entries.get(name) or checksum_of_file(path) for name, path in sorted(present.items())}
    content = {"algorithm": ALGORITHM, "files": {name: dataclasses.asdict(entry) for name, entry in files.items()}}
    (directory / MANIFEST).parent.mkdir(exist_ok=True)
    with atomic_file(directory / MANIFEST) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sync_tree(directory)


def read_manifest(directory: Path) -> dict[str, FileChecksum] | None:
    """The manifest's entries by relative path; None: an older version wrote the checkpoint, without a manifest.

    Raises:
        DamagedFile: it cannot be parsed.
        UserError: it is of a form that this version does not know.
    """
    path = directory / MANIFEST
    try:
        with naming(path):
            content = json.loads(path.read_bytes(), object_pairs_hook=_without_repeats)
        _refuse_unknown_form(content, path)
        entries = {name: FileChecksum(**entry) for name, entry in content["files"].items()}
        if not all(_plausible(name, entry) for name, entry in entries.items()):
            raise ValueError("a size, a checksum or a path has the wrong form")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{path}: damaged, so nothing can be verified by it ({error}); copy the file again"
        raise DamagedFile(reason, path) from None
    return entries


def _refuse_unknown_form(content: Any, path: Path) -> None:
    """A manifest that parses and says more than this version reads was written by another version: not damage."""
    known = {field.name for field in dataclasses.fields(FileChecksum)}
    unknown = sorted({name for entry in content["files"].values() if entry.keys() > known for name in entry} - known)
    if content["algorithm"] != ALGORITHM or unknown:
        form = f"entries with {unknown[0]!r:.40}" if unknown else f"algorithm {content['algorithm']!r:.40}"
        raise UserError(f"{path}: {form}, which this version does not know; install the version that wrote it")


def verify(directory: Path, rank: int = 0, world_size: int = 1, small_only: bool = False) -> bool:
    """Compare an iteration directory with its manifest: sizes of all files, content of this rank's share of them.

    Args:
        rank: whose share; the shares of ranks 0 to `world_size` - 1 are all files, about equal in bytes.
        small_only: leave the content of the tensors' files (*.distcp) out, for who does not read them.

    Returns:
        False: there is no manifest, so nothing was verified.

    Raises:
        DamagedFile: naming the first file that is missing, cut or changed.
        UserError: a file beside the card is not in the manifest.
        OSError: a file cannot be read, which says nothing about its content.
    """
    entries = read_manifest(directory)
    if entries is None:
        return False
    _check_presence(directory, entries)
    wanted = {name: entry for name, entry in entries.items() if not (small_only and name.endswith(".distcp"))}
    for name in _shares(wanted, world_size)[rank]:
        _check_content(directory / name, entries[name])
    return True


def verify_file(path: Path, directory: Path) -> bool:
    """Compare one file of an iteration directory with the manifest, read from the disk where that can be asked for.

    Returns:
        False: the manifest does not list the file, or there is no manifest.

    Raises:
        DamagedFile: the file, or the manifest.
        OSError: one of them cannot be read.
    """
    _forget_cached(directory / MANIFEST)
    entries = read_manifest(directory) or {}
    name = path.relative_to(directory).as_posix()
    if name not in entries:
        return False
    _check_size(path, entries[name])
    _forget_cached(path)
    _check_content(path, entries[name])
    return True


def _check_presence(directory: Path, entries: Mapping[str, FileChecksum]) -> None:
    for name, entry in entries.items():
        _check_size(directory / name, entry)
    for path in _files(directory / MANIFEST.parent):  # an addition, so no proof that anything is damaged
        name = path.relative_to(directory).as_posix()
        if name not in entries:
            raise UserError(f"{path}: not in {MANIFEST}: it is not of this checkpoint, or the manifest is damaged")


def _check_size(path: Path, entry: FileChecksum) -> None:
    if os.path.lexists(path) and not path.is_file():  # somebody put it there, and nothing is known of the file
        raise UserError(f"{path}: a link that leads to no file, or no file at all; is what it leads to mounted here?")
    if not path.is_file():
        raise DamagedFile(f"{path}: no such file, but {MANIFEST} lists it; copy the checkpoint again", path)
    size = path.stat().st_size
    if size != entry.bytes:
        raise DamagedFile(f"{path}: damaged: {size:,} bytes, {entry.bytes:,} were written", path)


def _check_content(path: Path, entry: FileChecksum) -> None:
    found = checksum_of_file(path)
    if found != entry:
        raise DamagedFile(
            f"{path}: damaged: its checksum is {found.checksum}, {MANIFEST} says {entry.checksum}; "
            "copy the file again, or use another checkpoint",
            path,
        )


def _forget_cached(path: Path) -> None:
    """Let the next read of a file come from the disk, not from the kernel's cache, where the system can do it."""
    with contextlib.suppress(OSError, AttributeError), open(path, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _shares(entries: Mapping[str, FileChecksum], world_size: int) -> list[list[str]]:
    """Files by rank: each, the largest first, to the rank with the fewest bytes so far."""
    shares: list[list[str]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for name in sorted(entries, key=lambda name: (-entries[name].bytes, name)):
        rank = loads.index(min(loads))
        shares[rank].append(name)
        loads[rank] += entries[name].bytes + 1
    return shares


def _files(directory: Path) -> Iterator[Path]:
    """Every file of the checkpoint below a directory, the manifest and half-written ones left out."""
    for path in directory.rglob("*"):
        if path.is_file() and path.parts[-2:] != MANIFEST.parts and ".partial-" not in path.name:
            yield path


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A flipped bit can turn one name into the next: JSON would keep the last of the two and say nothing."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name is there twice")
    return content


def _plausible(name: str, entry: FileChecksum) -> bool:
    path = Path(name)
    inside = not path.is_absolute() and ".." not in path.parts and name not in ("", ".")
    return inside and type(entry.bytes) is int and isinstance(entry.checksum, str)
