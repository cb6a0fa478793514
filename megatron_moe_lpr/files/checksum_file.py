"""The checksum file of a checkpoint: written with the checkpoint, compared with its files when they are read.

ITERATION/moe_lpr/checksums.json    {"algorithm": "xxh3_128", "files": {relative path: {"bytes": n, "checksum": hex}}}

It lists every file below the iteration directory except itself. xxh3 detects damage, not intent: whoever can write the
directory can write the checksum file too.
"""

import contextlib
import dataclasses
import heapq
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import DamagedFile, UserError, name_file_in_oserror
from megatron_moe_lpr.files.checksums import FileChecksum, checksum_of_file
from megatron_moe_lpr.files.fsync import sync_tree
from megatron_moe_lpr.files.json_files import refuse_repeated_names, write_json

ALGORITHM = "xxh3_128"
CHECKSUM_FILE = Path("moe_lpr", "checksums.json")


def write_checksums(directory: Path, entries: Mapping[str, FileChecksum]) -> None:
    """Write the checksum file of a complete iteration directory and wait until the directory is on the disk (fsync).

    Files without an entry, the small ones beside the tensors, are read for their checksum.

    Args:
        entries: checksums computed while files were written, by POSIX path relative to `directory`.

    Raises:
        UserError: a file with an entry is missing or has another size.
    """
    present = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
    for name, entry in entries.items():
        if name not in present or present[name].stat().st_size != entry.bytes:
            raise UserError(f"{directory / name}: {entry.bytes:,} bytes were written, and they are not there")
    files = {name: entries.get(name) or checksum_of_file(path) for name, path in sorted(present.items())}
    content = {"algorithm": ALGORITHM, "files": {name: dataclasses.asdict(entry) for name, entry in files.items()}}
    (directory / CHECKSUM_FILE).parent.mkdir(exist_ok=True)
    write_json(content, directory / CHECKSUM_FILE)
    sync_tree(directory)


def read_checksums(directory: Path) -> dict[str, FileChecksum] | None:
    """Entries of the checksum file by relative path; None: an older version wrote the checkpoint, without the file.

    Raises:
        DamagedFile: the file cannot be parsed.
        UserError: its form is one that this version does not know.
    """
    path = directory / CHECKSUM_FILE
    try:
        with name_file_in_oserror(path):
            content = json.loads(path.read_bytes(), object_pairs_hook=refuse_repeated_names)
        _refuse_unknown_form(content, path)
        entries = {name: FileChecksum(**entry) for name, entry in content["files"].items()}
        if not all(_is_plausible(name, entry) for name, entry in entries.items()):
            raise ValueError("a size, a checksum or a path has the wrong form")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{path}: damaged, so nothing can be verified by it ({error}); copy the file again"
        raise DamagedFile(reason, path) from None
    return entries


def _refuse_unknown_form(content: Any, path: Path) -> None:
    """Refuse a file that parses and holds more than this version reads: a newer version wrote it, it is not damaged."""
    known = {field.name for field in dataclasses.fields(FileChecksum)}
    unknown = sorted({name for entry in content["files"].values() if entry.keys() > known for name in entry} - known)
    if content["algorithm"] != ALGORITHM or unknown:
        form = f"entries with {unknown[0]!r:.40}" if unknown else f"algorithm {content['algorithm']!r:.40}"
        raise UserError(f"{path}: {form}, which this version does not know; install the version that wrote it")


def verify(
    directory: Path, rank: int = 0, world_size: int = 1, small_only: bool = False, tensor_sizes: bool = True
) -> bool:
    """Compare an iteration directory with its checksum file: size and content of this rank's files.

    Args:
        rank: the files are distributed over ranks 0 to `world_size` - 1, about equal in bytes.
        small_only: do not read the tensor files (*.distcp), for callers that do not use them.
        tensor_sizes: with `small_only`, compare the sizes of the tensor files. A run of many ranks divides that among
            them instead: each of N ranks would ask the file system for the sizes of N files and more.

    Returns:
        False: there is no checksum file, so nothing was verified.

    Raises:
        DamagedFile: naming the first file that is missing, cut short or changed.
        UserError: a file beside the card is not listed.
        OSError: a file cannot be read, which does not mean that it is damaged.
    """
    entries = read_checksums(directory)
    if entries is None:
        return False
    selected = {name: entry for name, entry in entries.items() if not (small_only and name.endswith(".distcp"))}
    own = _files_by_rank(selected, world_size)[rank]
    _check_presence(directory, entries, list(entries) if small_only and tensor_sizes else own)
    for name in own:
        _check_content(directory / name, entries[name])
    return True


def verify_file(path: Path, directory: Path) -> bool:
    """Compare one file of an iteration directory with the checksum file, read from the disk where the system can.

    Returns:
        False: the checksum file does not list the file, or does not exist.

    Raises:
        DamagedFile: the file, or the checksum file, is damaged.
        OSError: one of them cannot be read.
    """
    _drop_from_page_cache(directory / CHECKSUM_FILE)
    entries = read_checksums(directory) or {}
    name = path.relative_to(directory).as_posix()
    if name not in entries:
        return False
    _check_size(path, entries[name])
    _drop_from_page_cache(path)
    _check_content(path, entries[name])
    return True


def _check_presence(directory: Path, entries: Mapping[str, FileChecksum], names: Iterable[str]) -> None:
    for name in names:
        _check_size(directory / name, entries[name])
    for path in _files(directory / CHECKSUM_FILE.parent):
        name = path.relative_to(directory).as_posix()
        if name not in entries:  # an added file does not prove that another one is damaged
            raise UserError(f"{path}: not in {CHECKSUM_FILE}: it is not of this checkpoint, or that file is damaged")


def _check_size(path: Path, entry: FileChecksum) -> None:
    if os.path.lexists(path) and not path.is_file():  # put there by someone; says nothing about the file written
        raise UserError(f"{path}: a link that leads to no file, or no file at all; is what it leads to mounted here?")
    if not path.is_file():
        raise DamagedFile(f"{path}: no such file, but {CHECKSUM_FILE} lists it; copy the checkpoint again", path)
    size = path.stat().st_size
    if size != entry.bytes:
        raise DamagedFile(f"{path}: damaged: {size:,} bytes, {entry.bytes:,} were written", path)


def _check_content(path: Path, entry: FileChecksum) -> None:
    found = checksum_of_file(path)
    if found != entry:
        raise DamagedFile(
            f"{path}: damaged: its checksum is {found.checksum}, {CHECKSUM_FILE} says {entry.checksum}; "
            "copy the file again, or use another checkpoint",
            path,
        )


def _drop_from_page_cache(path: Path) -> None:
    """Let the next read of a file come from the disk, on systems that have posix_fadvise."""
    with contextlib.suppress(OSError, AttributeError), open(path, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files_by_rank(entries: Mapping[str, FileChecksum], world_size: int) -> list[list[str]]:
    """Distribute files over ranks: each file, largest first, to the rank with the fewest bytes so far."""
    files: list[list[str]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for name in sorted(entries, key=lambda name: (-entries[name].bytes, name)):
        load, rank = loads[0]
        files[rank].append(name)
        heapq.heapreplace(loads, (load + entries[name].bytes + 1, rank))
    return files


def _files(directory: Path) -> Iterator[Path]:
    """Every file of a checkpoint below a directory, except the checksum file and half-written ones."""
    for path in directory.rglob("*"):
        if path.is_file() and path.parts[-2:] != CHECKSUM_FILE.parts and ".partial-" not in path.name:
            yield path


def _is_plausible(name: str, entry: FileChecksum) -> bool:
    path = Path(name)
    inside = not path.is_absolute() and ".." not in path.parts and name not in ("", ".")
    return inside and type(entry.bytes) is int and isinstance(entry.checksum, str)
