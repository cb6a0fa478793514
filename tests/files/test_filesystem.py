"""Files as output: links, pipes, mounted files, what is refused before the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files import filesystem
from megatron_moe_lpr.files.filesystem import atomic_file, check_output_file


def write(target: Path, text: str = "new") -> None:
    with atomic_file(target) as partial:
        partial.write_text(text)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    write(tmp_path / "x", "old")
    with pytest.raises(ValueError, match="no"), atomic_file(tmp_path / "x") as partial:
        partial.write_text("half")
        raise ValueError("no")
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]
    write(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "new" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays(tmp_path: Path, exists: bool) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if exists:
        (disk / "real").write_text("old")
    (tmp_path / "x").symlink_to("disk/real")
    check_output_file(tmp_path / "x", "--output")
    with atomic_file(tmp_path / "x") as partial:
        assert partial.parent == disk
        partial.write_text("new")
    assert (tmp_path / "x").is_symlink() and (disk / "real").read_text() == "new" and names(disk) == ["real"]


def test_a_file_that_cannot_be_replaced_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text("something longer")
    inode = (tmp_path / "x").stat().st_ino
    monkeypatch.setattr(filesystem, "is_mount_point", lambda path: path == tmp_path / "x")
    with atomic_file(tmp_path / "x") as partial:
        partial.write_text("new")
        assert (tmp_path / "x").read_text() == "something longer"
    assert (tmp_path / "x").read_text() == "new" and (tmp_path / "x").stat().st_ino == inode
    assert names(tmp_path) == ["x"] and not partial.exists()


def test_what_is_written_over_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(filesystem, "is_mount_point", lambda path: path == tmp_path / "x")

    def full(path: Path) -> None:
        if path.name == "x":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(filesystem, "sync_file", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "old"


def test_a_file_that_is_mounted(tmp_path: Path) -> None:
    for name in ("host", "out"):
        (tmp_path / name).write_text("old")
    mount = ["mount", "--bind", str(tmp_path / "host"), str(tmp_path / "out")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        write(tmp_path / "out")
        assert (tmp_path / "host").read_text() == "new"
    finally:
        subprocess.run(["umount", str(tmp_path / "out")], check=True)


WRITER = """
from pathlib import Path
from megatron_moe_lpr.files.filesystem import atomic_file, check_output_file

print("before", flush=True)
check_output_file(Path("/dev/stdout"), "--output")
with atomic_file(Path("/dev/stdout")) as partial:
    partial.write_text("content")
"""


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_output(tmp_path: Path, kind: str) -> None:
    words = [sys.executable, "-c", WRITER]
    device = os.lstat("/dev/stdout")
    if kind == "pipe":
        text = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    else:
        with open(tmp_path / "log", "w") as log:
            subprocess.run(words, stdout=log, check=True)
        text = (tmp_path / "log").read_text()
    assert text == "before\ncontent"
    assert os.path.samestat(os.lstat("/dev/stdout"), device)


def test_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "unmounted").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    cases = {
        "directory": "--output .*directory: is a directory",
        "missing/x": "--output .*x: there is no directory .*missing",
        "file/x": "--output .*x: there is no directory",
        "unmounted/x": "unmounted is a symbolic link to nowhere, which does not exist",
        "circle": "symbolic links lead in a circle",
    }
    for name, words in cases.items():
        with pytest.raises(UserError, match=words):
            check_output_file(tmp_path / name, "--output")
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(UserError, match="cannot be written to"):
        check_output_file(tmp_path / "new", "--output")
    check_output_file(tmp_path / "file", "--output")
    assert names(tmp_path) == ["circle", "directory", "file", "unmounted"]


def test_what_a_killed_run_left_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".x.partial-17").write_text("half")
    check_output_file(tmp_path / "x", "--output")
    assert ".x.partial-17: a run left it that was killed" in capsys.readouterr().err
