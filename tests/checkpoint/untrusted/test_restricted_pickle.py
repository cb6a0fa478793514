"""What pickles do, not only what they name: each hostile action is refused, and nothing of the process is changed."""

import io
import pickle
import pickletools
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from megatron_moe_lpr.checkpoint.format.reader import CheckpointReader, read_index
from megatron_moe_lpr.checkpoint.format.writer import CheckpointWriter
from megatron_moe_lpr.checkpoint.loading.distributed_loading import load_distributed
from megatron_moe_lpr.checkpoint.untrusted.torch_files import load_file, load_storage
from megatron_moe_lpr.errors import UserError
from tests.fuzzing.canary import state_of
from tests.fuzzing.opcodes import name, text
from tests.fuzzing.pickles import METADATA_NAMES, TORCH_NAMES, in_archive

PATH, SIZE, DTYPE = name("pathlib", "PosixPath"), name("torch", "Size"), name("torch", "float32")
FORMAT = name("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")
LAYOUT, GETATTR = name("torch.serialization", "_get_layout"), name("builtins", "getattr")
STATE = b"}" + text("_str") + text("/nowhere/victim") + b"s"
NUMBERS = b"".join(b"\x8a\x09" + ((index << 61) - index).to_bytes(9, "little") + b"N" for index in range(1, 100))
ACTIONS = {
    "BUILD on a class": PATH + STATE + b"b",
    "BUILD of slots on a class": PATH + b"(N" + STATE + b"tb",
    "BUILD on an enumeration": FORMAT + b"(N}" + text("_member_map_") + b"}stb",
    "BUILD on a member": FORMAT + b"K\0\x85R" + STATE + b"b",
    "BUILD on a member by name": GETATTR + FORMAT + text("TORCH_CHANNELS_LAST") + b"\x86R" + STATE + b"b",
    "BUILD on a function": LAYOUT + STATE + b"b",
    "BUILD on a dtype": DTYPE + STATE + b"b",
    "BUILD on what a function returns": LAYOUT + text("torch.strided") + b"\x85R" + STATE + b"b",
    "BUILD twice": SIZE + b")\x81" + STATE + b"b" + STATE + b"b",
    "SETITEM on a class": PATH + text("a") + text("b") + b"s",
    "SETITEMS on a made object": PATH + b")\x81(" + text("a") + text("b") + b"u",
    "APPEND to a class": PATH + text("a") + b"a",
    "APPENDS to a string": text("a") + b"(" + text("b") + b"e",
    "ADDITEMS to a dict": b"}(" + text("b") + b"\x90",
    "a call of what a call returned": PATH + b")R)R",
    "a call of a string": text("os.getcwd") + b")R",
    "NEWOBJ of a function": b"(" + LAYOUT + b"o",
    "NEWOBJ_EX": PATH + b")}\x92",
    "INST": b"(ipathlib\nPosixPath\n",
    "a dotted name": text("pathlib") + text("Path.home") + b"\x93",
    "a persistent id": b"Pa\n",
    "a persistent id from the stack": b"NQ",
    "an extension": b"\x82\x01",
    "a set": b"\x8f",
    "a buffer": b"\x97",
    "a bytearray of 4 GB": b"\x96" + (1 << 32).to_bytes(8, "little"),
    "a tuple as key": b"})N\x86N\x86Ns",
    "numbers of one hash as keys": b"}(" + NUMBERS + b"u",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("written")
    with CheckpointWriter(directory, {}) as writer:
        writer.write("decoder.a", torch.ones(4, 3))
    return directory


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_in_front_of_a_valid_index(action: str, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    valid, before = (written / ".metadata").read_bytes(), state_of(METADATA_NAMES)
    (tmp_path / ".metadata").write_bytes(valid[:2] + ACTIONS[action] + b"0" + valid[2:])
    with pytest.raises(UserError, match=r"\.metadata: not the index of a checkpoint \(") as caught:
        CheckpointReader(tmp_path)
    assert "\n" not in str(caught.value)
    assert state_of(METADATA_NAMES) == before and str(Path("x")) == "x"


def test_an_object_of_another_kind_in_each_place(written: Path, tmp_path: Path) -> None:
    """Every name of the index replaced by another one that is allowed: each is refused."""
    valid = (written / ".metadata").read_bytes()
    index = pickle.loads(valid)  # written by the fixture above
    plain = pickle.dumps(index, protocol=2)
    names = [name("torch", "float32"), name("torch", "Size"), FORMAT, PATH, LAYOUT, name("collections", "OrderedDict")]
    places = pickle_globals(plain)
    assert len(places) >= 6
    for begin, end in places:
        for other in names:
            # What the writer notes of itself is not read.
            if other == plain[begin:end] or b"StorageMeta" in plain[begin:end]:
                continue
            (tmp_path / ".metadata").write_bytes(plain[:begin] + other + plain[end:])
            with pytest.raises(UserError):
                read_index(tmp_path / ".metadata")
    (tmp_path / ".metadata").write_bytes(plain)
    assert read_index(tmp_path / ".metadata").storage_data == index.storage_data


def pickle_globals(data: bytes) -> list[tuple[int, int]]:
    found = [(opcode.name, place) for opcode, _, place in pickletools.genops(data)]
    ends = [place for _, place in found[1:]] + [len(data)]
    return [(place, end) for (opcode, place), end in zip(found, ends, strict=True) if opcode == "GLOBAL"]


def test_chunks_that_many_tensors_share_are_bounded(tmp_path: Path) -> None:
    """A list of 2,000 chunks, referred to by 2,000 tensors: four million from 40 KB."""
    metadata = name("torch.distributed.checkpoint.metadata", "Metadata")
    entry = name("torch.distributed.checkpoint.metadata", "TensorStorageMetadata")
    chunk = name("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata")
    size = SIZE + b")\x85Rq\x01"
    chunks = (
        b"]("
        + chunk
        + b")\x81}("
        + text("offsets")
        + size
        + text("sizes")
        + b"h\x01ubq\x02"
        + b"h\x02" * 2000
        + b"eq\x00"
    )
    layout = LAYOUT + text("torch.strided") + b"\x85R"
    properties = name("torch.distributed.checkpoint.metadata", "TensorProperties") + b")\x81("
    properties += DTYPE + layout + b"\x89" + FORMAT + b"K\0\x85R\x89tbq\x03"
    state = b"}(" + text("chunks") + b"h\x00" + text("size") + b"h\x01" + text("properties") + b"h\x03u"
    entries = b"".join(text(str(number)) + entry + b")\x81" + state + b"b" for number in range(2000))
    table = b"}(" + text("state_dict_metadata") + b"}(" + entries + b"u" + text("storage_data") + b"}ub."
    content = b"\x80\x02" + chunks + b"0" + properties + b"0" + metadata + b")\x81" + table
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="too many for the size of the file"):
        read_index(tmp_path / ".metadata")


def test_a_file_outside_of_the_directory_is_not_opened(written: Path, tmp_path: Path) -> None:
    for kind in ("tensor", "object"):
        shutil.copytree(written, tmp_path / kind)
        index = read_index(written / ".metadata")
        for place in index.storage_data.values():
            place.relative_path = "../outside"
        if kind == "object":
            index.state_dict_metadata = dict.fromkeys(
                index.state_dict_metadata, torch.distributed.checkpoint.metadata.BytesStorageMetadata()
            )
        (tmp_path / kind / ".metadata").write_bytes(pickle.dumps(index))
        (tmp_path / "outside").write_bytes(b"")
        with pytest.raises(UserError, match="not one of this directory"):
            CheckpointReader(tmp_path / kind)


MEMBER = name("megatron.core.transformer.enums", "AttnBackend") + b"K\x01\x85R"
STORAGE = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x02tq\x01"
TENSOR = name("torch._utils", "_rebuild_tensor_v2")
HOOKS = b"\x89" + name("collections", "OrderedDict") + b")R"
LARGE = b"\x8a\x05" + (1 << 32).to_bytes(5, "little")
MANY_TIMES = b"]q\0" + b"".join(
    b"(" + bytes([ord("h"), level]) * 10 + bytes([ord("l"), ord("q"), level + 1]) for level in range(30)
)
IN_FILES = {
    "BUILD on a member that Megatron allows": MEMBER + STATE + b"b.",
    "a name that Megatron allows": name("types", "SimpleNamespace") + b")\x81.",
    "a bytearray of 4 GB": name("builtins", "bytearray") + LARGE + b"\x85R.",
    "a storage of 16 GB": TENSOR + b"(" + STORAGE.replace(b"K\x02", LARGE) + b"QK\0K\2\x85K\1\x85" + HOOKS + b"tR.",
    "a tensor beyond its storage": TENSOR + b"(" + STORAGE + b"QK\0" + LARGE + b"\x85K\1\x85" + HOOKS + b"tR.",
    "a tensor many times in its storage": TENSOR + b"(" + STORAGE + b"QK\0" + LARGE + b"\x85K\0\x85" + HOOKS + b"tR.",
    "lists in lists, 10^30 values": MANY_TIMES + b".",
    "tables in tables, 2^45 values": b"}q\0" + b"}(K\0h\0K\1h\0uq\0" * 45 + b".",
    "a list in itself": b"]q\0h\0a.",
    "lists in lists, each seen before": b"]]q\0" + b"](h\0eq\0" * 60 + b"](" + b"h\0e.",
    "attributes of a tensor": TENSOR + b"(" + STORAGE + b"QK\0K\2\x85K\1\x85" + HOOKS + b"tR" + STATE + b"b.",
}  # fmt: skip


@pytest.mark.parametrize("action", IN_FILES)
def test_an_action_in_a_file_of_torch(action: str, written: Path, tmp_path: Path) -> None:
    before = state_of(TORCH_NAMES)
    file = in_archive(b"\x80\x02" + IN_FILES[action])
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        load_file(file)
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    (tmp_path / "common.pt").write_bytes(file.getvalue())
    with pytest.raises(UserError, match=r"common\.pt: damaged, or not of a checkpoint: "):
        load_distributed({}, tmp_path)
    assert state_of(TORCH_NAMES) == before and AttnBackend(1).name == "flash"


def test_an_archive_behind_something_else_is_refused() -> None:
    """torch.load would read what is in front of it alone."""
    front, behind = io.BytesIO(), io.BytesIO()
    torch.save({"a": {1, 2}, "b": torch.nn.Parameter(torch.ones(2))}, front, _use_new_zipfile_serialization=False)
    torch.save({"a": 1}, behind)
    with pytest.raises(pickle.UnpicklingError, match=r"not an archive of torch\.save"):
        load_file(io.BytesIO(front.getvalue() + behind.getvalue()))


def test_plain_values_and_tensors_pass() -> None:
    values = {
        "a": [1, 2.5, None, True, "x", b"bytes", 1 << 70, torch.Size([2]), torch.float16, (torch.ones(4, 4)[1:3, 2:],)],
        2: torch.zeros(3).to(torch.float8_e4m3fn),
        "empty": torch.ones(0, 3),
        "shared": [["x"] * 1000] * 900,
    }
    stream = io.BytesIO()
    torch.save(values, stream)
    loaded = load_file(stream)
    assert loaded["a"][:9] == values["a"][:9] and torch.equal(loaded["a"][9][0], torch.ones(2, 2))
    assert loaded[2].dtype == torch.float8_e4m3fn and loaded["empty"].shape == (0, 3)
    assert AttnBackend in torch.serialization.get_safe_globals()
    content = torch.arange(3.0)._typed_storage().__reduce__()[1][0]
    assert load_storage(content).tolist() == [0, 1, 2]
