"""Readers of pickles, fed with programs of opcodes: they return plain values and change nothing of the process."""

import contextlib
import io
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from megatron.core.safe_globals import SAFE_GLOBALS
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from megatron_moe_lpr.checkpoint.format.reader import read_index
from megatron_moe_lpr.checkpoint.untrusted.extra_state import check_extra_states
from megatron_moe_lpr.checkpoint.untrusted.fp8_recipes import RECIPE_MODULE
from megatron_moe_lpr.checkpoint.untrusted.index_values import ALLOWED_IN_METADATA
from megatron_moe_lpr.checkpoint.untrusted.torch_files import load_file
from megatron_moe_lpr.errors import UserError
from tests.fuzzing.canary import state_of
from tests.fuzzing.opcodes import programs
from tests.fuzzing.recipes import CLASSES, DelayedScaling, stand_in

CANARY = (("tests.fuzzing.canary", "run"), ("tests.fuzzing", "canary.run"), ("builtins", "getattr"), ("os", "getcwd"))
METADATA_NAMES = [
    (module, name)
    for module, names in ALLOWED_IN_METADATA.items()
    if module != "pathlib._local"
    for name in sorted(names)
    if module != "torch" or name in ("Size", "float32")
] + [("torch.distributed.checkpoint.planner", "WriteItemType"), *CANARY]
EXTRA_STATE_NAMES = [(RECIPE_MODULE, one.__name__) for one in CLASSES] + [
    ("torch._utils", "_rebuild_tensor_v2"), ("torch.storage", "_load_from_bytes"), ("collections", "OrderedDict"),
    *CANARY,
]  # fmt: skip
TORCH_NAMES = [(one.__module__, one.__name__) for one in SAFE_GLOBALS] + [
    ("torch._utils", "_rebuild_tensor_v2"), ("torch", "FloatStorage"), ("torch", "Size"), ("builtins", "bytearray"),
    ("collections", "Counter"), *CANARY,
]  # fmt: skip
PLAIN = (dict, list, tuple, str, bytes, int, float, bool, type(None), torch.Tensor, torch.Size, torch.dtype)


def metadata_programs(valid: bytes) -> st.SearchStrategy[bytes]:
    """Before the index of a checkpoint, or instead of it."""
    return programs(METADATA_NAMES, valid)


def read_metadata(path: Path) -> None:
    """`read_index`, whose tables hold what they should."""
    with _unchanged(METADATA_NAMES):
        index = read_index(path)
    assert type(index) is Metadata
    for key, entry in index.state_dict_metadata.items():
        assert type(key) is str and type(entry) in (TensorStorageMetadata, BytesStorageMetadata)
        assert type(entry) is BytesStorageMetadata or type(entry.size) is torch.Size
    assert all(type(place.relative_path) is str for place in index.storage_data.values())


def extra_state(root: Path) -> Path:
    """Scales and a recipe, as Transformer Engine pickles them."""
    state = {"recipe": DelayedScaling(margin=2), "scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}}
    with stand_in():
        (root / "state").write_bytes(pickle.dumps(state))
    return root / "state"


def extra_state_programs(valid: bytes) -> st.SearchStrategy[bytes]:
    """Before an extra state, or instead of it."""
    return programs(EXTRA_STATE_NAMES, valid)


def read_extra_state(path: Path) -> None:
    """`check_extra_states`, then what Transformer Engine does with the bytes."""
    table: dict[str, Any] = {"a._extra_state": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)}
    with stand_in(), _unchanged(EXTRA_STATE_NAMES):
        check_extra_states(table, path)
        found = pickle.loads(table["a._extra_state"].numpy().tobytes())  # made by check_extra_states itself
        _check_plain({name: value for name, value in found.items() if name != "recipe"})


def torch_file(root: Path) -> Path:
    """The pickle in a file of torch.save, without the archive around it."""
    stream = io.BytesIO()
    torch.save({"a": 1, "b": [torch.ones(2)]}, stream)
    with zipfile.ZipFile(stream) as archive:
        (root / "data.pkl").write_bytes(archive.read("archive/data.pkl"))
    return root / "data.pkl"


def torch_file_programs(valid: bytes) -> st.SearchStrategy[bytes]:
    """Before the pickle of a file of torch.save, or instead of it."""
    return programs(TORCH_NAMES, valid)


def in_archive(content: bytes) -> io.BytesIO:
    """A file of torch.save around a pickle, with one storage of two numbers."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in (("data.pkl", content), ("data/0", bytes(8)), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", data)
    stream.seek(0)
    return stream


def read_torch_file(path: Path) -> None:
    """`load_file`, whose values are plain."""
    with _unchanged(TORCH_NAMES):
        try:
            found = load_file(in_archive(path.read_bytes()))
        except Exception as error:
            # Its callers make such a line of any error.
            raise UserError(str(error) or type(error).__name__) from None
    _check_plain(found)


@contextlib.contextmanager
def _unchanged(names: Sequence[tuple[str, str]]) -> Iterator[None]:
    before, path = state_of(names), str(Path("x"))
    try:
        yield
    finally:
        assert state_of(names) == before and str(Path("x")) == path


def _check_plain(value: Any) -> None:
    assert type(value) in PLAIN, type(value)
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        for one in value:
            _check_plain(one)
