"""Checksums of a checkpoint's files."""

import io
import json
from pathlib import Path

import pytest
import torch
import xxhash

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files import checksum_file
from megatron_moe_lpr.files.checksum_file import CHECKSUM_FILE, read_checksums, verify, write_checksums
from megatron_moe_lpr.files.checksums import ChecksumStream, FileChecksum, checksum_of_file


def make_files(directory: Path) -> dict[str, bytes]:
    contents = {f"__{rank}_0.distcp": bytes([rank]) * (1000 * rank + 1) for rank in range(4)}
    contents |= {".metadata": b"index", "common.pt": b"common", "moe_lpr/card.json": b"{}", "metadata.json": b"{}"}
    (directory / "moe_lpr").mkdir()
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return contents


def flip(path: Path, place: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_stream_sums_what_torch_writes(tmp_path: Path) -> None:
    with ChecksumStream(open(tmp_path / "a.distcp", "wb")) as stream:
        torch.save(torch.arange(1000), stream)
        begin = stream.tell()
        torch.save({"b": torch.ones(7)}, stream)
        assert stream.seek(0, io.SEEK_END) == stream.tell()
        with pytest.raises(io.UnsupportedOperation):
            stream.seek(begin)
    content = (tmp_path / "a.distcp").read_bytes()
    assert stream.entry() == FileChecksum(len(content), xxhash.xxh3_128_hexdigest(content))
    assert stream.entry() == checksum_of_file(tmp_path / "a.distcp")
    assert torch.equal(torch.load(io.BytesIO(content[begin:]))["b"], torch.ones(7))


def test_the_checksum_file_lists_every_file(tmp_path: Path) -> None:
    contents = make_files(tmp_path)
    summed = {name: checksum_of_file(tmp_path / name) for name in contents if name.endswith(".distcp")}
    write_checksums(tmp_path, summed)
    content = json.loads((tmp_path / CHECKSUM_FILE).read_text())
    assert content["algorithm"] == "xxh3_128"
    assert content["files"] == {
        name: {"bytes": len(text), "checksum": xxhash.xxh3_128_hexdigest(text)} for name, text in contents.items()
    }
    assert verify(tmp_path)


def test_an_entry_without_its_file_is_refused(tmp_path: Path) -> None:
    make_files(tmp_path)
    with pytest.raises(UserError, match=r"lost\.distcp"):
        write_checksums(tmp_path, {"lost.distcp": FileChecksum(3, "0")})
    with pytest.raises(UserError, match=r"common\.pt: 7 bytes were written"):
        write_checksums(tmp_path, {"common.pt": FileChecksum(7, "0")})


@pytest.mark.parametrize("world_size", [1, 3])
def test_each_damage_is_found_by_one_rank(world_size: int, tmp_path: Path) -> None:
    contents = make_files(tmp_path)
    write_checksums(tmp_path, {})
    for name in contents:
        flip(tmp_path / name, -1)
        errors = []
        for rank in range(world_size):
            try:
                verify(tmp_path, rank, world_size)
            except UserError as error:
                errors.append(str(error))
        assert len(errors) == 1 and name in errors[0] and "damaged" in errors[0]
        flip(tmp_path / name, -1)
    assert all(verify(tmp_path, rank, world_size) for rank in range(world_size))


def test_cut_missing_and_added_files(tmp_path: Path) -> None:
    contents = make_files(tmp_path)
    write_checksums(tmp_path, {})
    (tmp_path / "__2_0.distcp").write_bytes(contents["__2_0.distcp"][:-1])
    with pytest.raises(UserError, match=r"__2_0\.distcp: damaged: 2,000 bytes, 2,001"):
        verify(tmp_path, small_only=True)
    (tmp_path / "__2_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__2_0\.distcp: no such file"):
        verify(tmp_path)
    assert verify(tmp_path, small_only=True, tensor_sizes=False)
    (tmp_path / "__2_0.distcp").write_bytes(contents["__2_0.distcp"])
    (tmp_path / "moe_lpr" / "added_tokens.json").touch()
    with pytest.raises(UserError, match=r"added_tokens\.json: not in"):
        verify(tmp_path)


def test_every_flip_in_the_checksum_file_is_found_or_harmless(tmp_path: Path) -> None:
    make_files(tmp_path)
    write_checksums(tmp_path, {})
    right = read_checksums(tmp_path)
    for place in range(0, (tmp_path / CHECKSUM_FILE).stat().st_size, 3):
        flip(tmp_path / CHECKSUM_FILE, place)
        try:
            verify(tmp_path)
        except UserError:
            pass
        else:
            assert read_checksums(tmp_path) == right  # spaces between words
        flip(tmp_path / CHECKSUM_FILE, place)


def test_a_checkpoint_without_checksums_is_not_verified(tmp_path: Path) -> None:
    make_files(tmp_path)
    assert read_checksums(tmp_path) is None and not verify(tmp_path)


def test_many_ranks_ask_for_the_size_of_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared file system N ranks that each ask for N files take minutes."""
    files = make_files(tmp_path)
    write_checksums(tmp_path, {})
    asked = []
    original = checksum_file._check_size
    monkeypatch.setattr(checksum_file, "_check_size", lambda path, entry: (asked.append(path), original(path, entry)))
    for rank in range(5):
        assert verify(tmp_path, rank, 5)
    assert sorted(asked) == sorted(tmp_path / name for name in files)
