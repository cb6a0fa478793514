"""Loads untrusted files of torch.save: checked by the restricted reader first, then read by `torch.load`.

torch's own restriction (`weights_only`) accepts classes that libraries add to it, Megatron some twenty, among them
enumerations whose members BUILD would change for the whole process; and it allocates as much memory as a number says.
"""

import contextlib
import errno
import io
import math
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_moe_lpr.checkpoint.untrusted.index_values import DTYPES
from megatron_moe_lpr.checkpoint.untrusted.restricted_pickle import (
    MAX_DEPTH,
    Call,
    Name,
    PersistentId,
    check_extent,
    read_pickle,
    whole_number,
)

REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
REBUILD_BY_DTYPE = Name("torch._utils", "_rebuild_tensor_v3")
"""Used for newer dtypes, such as FP8, that have no storage class of their own."""
STORAGES = {
    Name("torch", name): dtype.itemsize for dtype, name in torch.storage._dtype_to_storage_type_map().items()
} | {Name("torch.storage", "UntypedStorage"): 1}
"""Storage classes, with the bytes of an element."""
ZIP_MAGIC = b"PK\x03\x04"
"""The first bytes of an archive, by which `torch.load` recognises it."""
MAX_DIMENSIONS = 64
MAX_REASON = 300
LEGACY_PICKLES = 5
"""Pickles in a storage that is pickled alone: magic number, version, sizes of types, storage, its key."""


class Window(io.RawIOBase):
    """A part of a file as a file of its own. Unlike torch's view of a part, it can be read to its end by zipfile."""

    def __init__(self, stream: io.BufferedReader, offset: int, length: int) -> None:
        self.stream, self.offset, self.length, self.place = stream, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        if place < 0:
            raise OSError(errno.EINVAL, "before the beginning")
        self.place = place
        return place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self.length - self.place, 0)]
        self.stream.seek(self.offset + self.place)
        count = self.stream.readinto(view)
        self.place += count
        return count


def load_part(stream: io.BufferedReader, offset: int, length: int) -> Any:
    """Load what torch.save wrote into `length` bytes of a file from `offset` on; see `load_file`."""
    check_file(Window(stream, offset, length))
    with no_added_classes():
        # torch made the view for its own load, but annotates it as IOBase.
        view: Any = _create_file_view(stream, offset, length)
        return torch.load(view, map_location="cpu", weights_only=True)


def load_file(stream: BinaryIO) -> Any:
    """Load what torch.save wrote, to the CPU: only plain values, lists, dicts and tensors.

    Args:
        stream: seekable, from its beginning to its end.

    Raises:
        pickle.UnpicklingError: it holds something else.
        Exception: it is damaged; almost any kind.
    """
    check_file(stream)
    stream.seek(0)
    with no_added_classes():
        return torch.load(stream, map_location="cpu", weights_only=True)


def check_file(stream: BinaryIO | Window) -> None:
    """Check that `torch.load` would read only plain values and tensors that the file is large enough for.

    Raises:
        pickle.UnpicklingError, zipfile.BadZipFile and almost any other: it would not.
    """
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        names = {entry.filename for entry in entries}
        # A compressed entry could unpack to a thousand times its size.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise pickle.UnpicklingError("is compressed, which no checkpoint is")
        end = stream.seek(0, io.SEEK_END)
        if len(names) != len(entries) or sum(max(entry.file_size, entry.compress_size) for entry in entries) > end:
            raise pickle.UnpicklingError("not an archive of torch.save")
    stream.seek(0)
    if stream.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
        # zipfile allows other bytes in front of an archive; torch would read only those.
        raise pickle.UnpicklingError("not an archive of torch.save")
    stream.seek(0)
    # torch's own archive reader, so that the bytes checked are those that torch.load will read. Unlike zipfile it
    # accepts checkpoints written without CRC32.
    content = torch._C.PyTorchFileReader(stream).get_record("data.pkl")  # type: ignore[arg-type]
    described = read_pickle(io.BytesIO(content), _is_allowed, persistent=True)
    check_extent(described, len(content))
    _Check().value(described)


def load_storage(content: bytes) -> torch.Tensor:
    """Load a storage that was pickled alone (like torch.storage `_load_from_bytes`, which unpickles unrestricted).

    Returns:
        Its values, shape [elements].

    Raises:
        pickle.UnpicklingError: it is something else.
        Exception: it is damaged; almost any kind.
    """
    stream, check = io.BytesIO(content), _Check()
    described = [read_pickle(stream, _is_allowed, persistent=True) for _ in range(LEGACY_PICKLES)]
    for value in described:
        check.value(value)
    if _storage_bytes(described[3]) > len(content):
        raise pickle.UnpicklingError("a storage is larger than its bytes")
    with no_added_classes():
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(found, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("it holds something else than a storage")
    return torch.empty(0, dtype=found.dtype).set_(found._untyped_storage)


def reason_in_one_line(error: BaseException) -> str:
    """An error's reason in one line; torch hides it behind advice to load without restriction."""
    lines = [line.strip("'\" ") for line in str(error).splitlines() if line.strip("'\" ")] or [type(error).__name__]
    advice = lines[0].startswith("Weights only load failed") and len(lines) > 1
    reason = lines[1 if advice else 0].rpartition("WeightsUnpickler error: ")[2]
    return reason.partition(": [")[0][:MAX_REASON]


@contextlib.contextmanager
def no_added_classes() -> Iterator[None]:
    """Let `torch.load` accept only torch's own classes, none that a library has added, while the block runs."""
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(added)


def check_tensor(found: Call) -> tuple[Any, int, tuple[int, ...], tuple[int, ...]]:
    """Check the description of a tensor.

    Returns:
        The description of its storage, the index of its first element there, shape and strides (in elements).

    Raises:
        pickle.UnpicklingError: it does not describe a tensor.
    """
    is_known = found.function in (REBUILD, REBUILD_BY_DTYPE) and found.state is None
    if not is_known or len(found.arguments) != (6 if found.function == REBUILD else 7):
        raise pickle.UnpicklingError(f"it calls {found.function.module}.{found.function.name} in another way")
    storage, offset, shape, strides, requires_grad, hooks = found.arguments[:6]
    plain = type(requires_grad) is bool and type(hooks) is dict and not hooks
    if not plain or type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor is none")
    if len(shape) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError("a tensor has too many dimensions")
    sizes, steps = (tuple(whole_number(value) for value in values) for values in (shape, strides))
    return storage, whole_number(offset), sizes, steps


def elements_needed(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements that a storage must have for a tensor: to its last element, and at least one for each element."""
    count = math.prod(shape)
    return max(count, offset + 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))) if count else 0


def _element_bytes(found: Call, storage: Any) -> int:
    if found.function == REBUILD:
        return STORAGES[storage.value[1]]
    dtype = found.arguments[6]
    if type(dtype) is not Name or dtype not in DTYPES:
        raise pickle.UnpicklingError("a tensor's dtype is none")
    return DTYPES[dtype].itemsize


class _Check:
    """Checks described values, each once however often it is referred to."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def value(self, found: Any, depth: int = 0) -> None:
        if type(found) in (dict, list, tuple, Call, PersistentId):
            if id(found) in self.seen:
                return
            self.seen.add(id(found))
        if depth > MAX_DEPTH:
            raise pickle.UnpicklingError("it is nested too deeply")
        if type(found) is dict:
            for key, value in found.items():
                if type(key) is Call:
                    raise pickle.UnpicklingError("an object is a key")
                self.value(value, depth + 1)
        elif type(found) in (list, tuple):
            for value in found:
                self.value(value, depth + 1)
        elif type(found) is PersistentId:
            _storage_bytes(found)
        elif type(found) is Call:
            self.call(found)
        elif type(found) is Name and found not in DTYPES:
            raise pickle.UnpicklingError(f"it holds {found.module}.{found.name} itself")

    @staticmethod
    def call(found: Call) -> None:
        if found.function == ("torch", "Size"):
            _check_size(found)
        elif found.function == ("_codecs", "encode"):
            _check_bytes(found)
        else:
            storage, offset, shape, strides = check_tensor(found)
            available = _storage_bytes(storage)
            if elements_needed(offset, shape, strides) * _element_bytes(found, storage) > available:
                raise pickle.UnpicklingError("a tensor is larger than its storage")


def _check_size(found: Call) -> None:
    if len(found.arguments) != 1 or type(found.arguments[0]) is not tuple or found.state is not None:
        raise pickle.UnpicklingError("a size is none")
    for value in found.arguments[0]:
        whole_number(value)


def _check_bytes(found: Call) -> None:
    """Check the description of bytes, which protocol 2 pickles as a text to be encoded."""
    if len(found.arguments) != 2 or type(found.arguments[0]) is not str or found.state is not None:
        raise pickle.UnpicklingError("bytes are none")
    if type(found.arguments[1]) is not str or found.arguments[1] != "latin1":
        raise pickle.UnpicklingError("bytes are none")


def _storage_bytes(found: Any) -> int:
    """Bytes of a storage as its reference declares: ("storage", class, key, device, elements[, view])."""
    value = found.value if type(found) is PersistentId else None
    if type(value) is not tuple or len(value) not in (5, 6) or type(value[0]) is not str or value[0] != "storage":
        raise pickle.UnpicklingError("it refers to something else than a storage")
    if type(value[1]) is not Name or value[1] not in STORAGES or value[5:] not in ((), (None,)):
        raise pickle.UnpicklingError("a storage is none")
    if type(value[2]) is not str or type(value[3]) is not str:
        raise pickle.UnpicklingError("a storage is none")
    return whole_number(value[4], 1 << 48) * STORAGES[value[1]]


def _is_allowed(module: str, name: str) -> bool:
    known = (REBUILD, REBUILD_BY_DTYPE, ("torch", "Size"), ("collections", "OrderedDict"), ("_codecs", "encode"))
    return (module, name) in known or (module, name) in STORAGES or (module, name) in DTYPES
