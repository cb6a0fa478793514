"""Directories as output: every kind of target, kills between the steps, two runs at once, file systems that refuse."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.conversion.hugging_face.hf_directory import open_hf_directory
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files import moving_in, output_directory, renaming, work_directory
from megatron_moe_lpr.files.output_directory import atomic_directory

LAST = ("config.json",)


def fill(directory: Path, text: str = "new") -> None:
    """Two files and a directory."""
    (directory / "sub").mkdir()
    for name in ("config.json", "weights", "sub/file"):
        (directory / name).write_text(text)


def tree(directory: Path) -> dict[str, str]:
    """Text of every file below a directory, hidden ones included; nothing else may be there."""
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


NEW, OLD = (dict.fromkeys(("config.json", "weights", "sub/file"), text) for text in ("new", "old"))


def write(target: Path, overwrite: bool = False) -> None:
    with atomic_directory(target, overwrite, LAST) as partial:
        fill(partial)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A directory with content."""
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    (target / "extra").write_text("old")
    return target


OLD |= {"extra": "old"}


@pytest.fixture
def without_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that does not know its flags."""
    monkeypatch.setattr(renaming, "_system_call", lambda: None)


@pytest.fixture(params=["renameat2", "without"])
def either(request: pytest.FixtureRequest) -> None:
    """With the exchange in one step, and without."""
    if request.param == "without":
        request.getfixturevalue("without_renameat2")


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory of which the system says that it is a mount point."""
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(output_directory, "is_mount_point", lambda path: path == volume)
    return volume


@pytest.mark.usefixtures("either")
class TestPlainTargets:
    """Names that are free or taken."""

    def test_new_with_its_parents(self, tmp_path: Path) -> None:
        write(tmp_path / "a" / "b" / "out")
        assert tree(tmp_path) == {f"a/b/out/{name}": text for name, text in NEW.items()}

    def test_failure_leaves_not_even_the_parents(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="full"), atomic_directory(tmp_path / "a" / "b"):
            raise ValueError("full")
        assert list(tmp_path.iterdir()) == []

    def test_empty_directory_keeps_its_mode(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir(mode=0o700)
        write(tmp_path / "out")
        assert tree(tmp_path / "out") == NEW
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700

    def test_full_directory_is_refused_untouched(self, old: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"out: exists and is not empty; .* --overwrite"):
            write(old)
        assert tree(old) == OLD and list(tmp_path.iterdir()) == [old]

    def test_overwrite(self, old: Path, tmp_path: Path) -> None:
        write(old, overwrite=True)
        assert tree(old) == NEW and list(tmp_path.iterdir()) == [old]

    def test_failure_with_overwrite_keeps_the_old(self, old: Path, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), atomic_directory(old, overwrite=True) as partial:
            fill(partial)
            raise KeyboardInterrupt
        assert tree(old) == OLD and list(tmp_path.iterdir()) == [old]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_file_in_the_way(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(UserError, match="out: exists and is not a directory"):
            write(tmp_path / "out", overwrite)
        assert tree(tmp_path) == {"out": "mine"}

    def test_relative_with_a_slash_behind_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write(Path("sub/../out/"))
        assert tree(tmp_path / "out") == NEW


class TestLinks:
    """Symbolic links stay, and the data goes where they lead."""

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_to_a_directory(self, tmp_path: Path, overwrite: bool) -> None:
        disk = tmp_path / "disk" / "real"
        disk.mkdir(parents=True)
        if overwrite:
            fill(disk, "old")
        (tmp_path / "out").symlink_to(disk)
        (tmp_path / "chain").symlink_to("out")
        with atomic_directory(tmp_path / "chain", overwrite) as partial:
            assert disk.parent in partial.parents
            fill(partial)
        assert tree(disk) == NEW and (tmp_path / "out").is_symlink() and (tmp_path / "chain").is_symlink()
        assert list(disk.parent.iterdir()) == [disk]

    @pytest.mark.parametrize("below", ["", "out"])
    def test_to_nothing(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "not mounted" / "x")
        with pytest.raises(UserError, match=r"link is a symbolic link to .*not mounted/x, which does not exist"):
            write(tmp_path / "link" / below)
        assert [path.name for path in tmp_path.iterdir()] == ["link"]

    def test_circle(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(UserError, match=r"a: .*symbolic link"):
            write(tmp_path / "a", overwrite=True)
        assert len(list(tmp_path.iterdir())) == 2

    def test_to_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "out").symlink_to("file")
        with pytest.raises(UserError, match="out: exists and is not a directory"):
            write(tmp_path / "out", overwrite=True)


def appear(target: Path) -> None:
    """Another program's directory."""
    target.mkdir()
    (target / "theirs").write_text("theirs")


@pytest.mark.usefixtures("either")
class TestMeanwhile:
    """What another process does to the target is never undone; our own work is kept too."""

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("content", ["full", "empty", "file", "link"])
    def test_something_appears(self, tmp_path: Path, content: str, overwrite: bool) -> None:
        target = tmp_path / "out"
        makers: dict[str, Callable[[], object]] = {
            "full": lambda: appear(target),
            "empty": target.mkdir,
            "file": lambda: target.write_text("theirs"),
            "link": lambda: target.symlink_to("nowhere"),
        }
        with (
            pytest.raises(UserError, match=r"out: appeared while this ran; .* complete in .*/out\.finished$"),
            atomic_directory(target, overwrite) as partial,
        ):
            fill(partial)
            makers[content]()
            theirs = target.lstat().st_ino
        assert target.lstat().st_ino == theirs
        assert tree(tmp_path / "out.finished") == NEW
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.finished"]

    def test_an_empty_target_is_filled(self, tmp_path: Path) -> None:
        target = tmp_path / "out"
        target.mkdir()
        with (
            pytest.raises(UserError, match="out: changed while this ran, as theirs in it"),
            atomic_directory(target, overwrite=True) as partial,
        ):
            fill(partial)
            (target / "theirs").write_text("theirs")
        assert tree(tmp_path) == {"out/theirs": "theirs"} | {f"out.finished/{name}": "new" for name in NEW}

    @pytest.mark.parametrize("change", ["added", "changed", "removed", "another", "gone"])
    def test_an_overwritten_target_changes(self, old: Path, tmp_path: Path, change: str) -> None:
        with (
            pytest.raises(UserError, match=r"out: .* while this ran.* complete in .*out\.finished"),
            atomic_directory(old, overwrite=True) as partial,
        ):
            fill(partial)
            if change == "added":
                (old / "sub" / "theirs").write_text("theirs")
            elif change == "changed":
                (old / "weights").write_text("trained")
            elif change == "removed":
                (old / "weights").unlink()
            else:
                old.rename(tmp_path / "moved")
                if change == "another":
                    appear(old)
            before = tree(old)
        assert tree(old) == before
        assert tree(tmp_path / "out.finished") == NEW
        assert not list(tmp_path.glob(".*"))

    def test_a_change_in_the_last_moment_is_undone(
        self, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exchange = renaming.exchange

        def late(first: Path, second: Path) -> bool:
            (second / "theirs").write_text("theirs") if not (second / "theirs").exists() else None
            return exchange(first, second)

        monkeypatch.setattr(output_directory, "exchange", late)
        with pytest.raises(UserError, match="changed while this ran, as theirs in it"):
            write(old, overwrite=True)
        assert tree(old) == OLD | {"theirs": "theirs"}

    def test_a_second_run_is_refused_at_its_start(self, tmp_path: Path) -> None:
        with atomic_directory(tmp_path / "out") as partial:
            with pytest.raises(UserError, match=r"out: another run writes it now \(process \d+ on "):
                write(tmp_path / "out", overwrite=True)
            fill(partial)
        assert tree(tmp_path / "out") == NEW and len(list(tmp_path.iterdir())) == 1

    def test_without_locks_a_work_directory_that_is_there_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_locks(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "no locks")

        monkeypatch.setattr("fcntl.flock", no_locks)
        write(tmp_path / "alone")
        with atomic_directory(tmp_path / "out") as partial:
            with pytest.raises(UserError, match=r"\.out\.partial: a killed run left it, or another run"):
                write(tmp_path / "out")
            fill(partial)
        assert tree(tmp_path / "out") == NEW


def refuse(number: int, where: Callable[[Path, Path], bool], times: int = 99) -> Callable[[Path, Path], None]:
    """os.rename that fails where asked to, so many times."""
    rename, left = os.rename, [times]

    def call(source: Path, target: Path) -> None:
        if left[0] and where(Path(source), Path(target)):
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(source))
        rename(source, target)

    return call


@pytest.mark.usefixtures("without_renameat2")
class TestFailingRenames:
    """Both contents survive, the old one at its place."""

    def test_the_second_of_two(self, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        refusing = refuse(errno.EIO, lambda source, target: target == old and source.name == "content")
        monkeypatch.setattr(os, "rename", refusing)
        with pytest.raises(UserError, match=r"out: Input/output error; .* complete in .*out\.finished"):
            write(old, overwrite=True)
        assert tree(old) == OLD and tree(tmp_path / "out.finished") == NEW
        assert not list(tmp_path.glob(".*"))

    def test_the_second_and_the_way_back(
        self, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(os, "rename", refuse(errno.EIO, lambda _, target: target == old))
        with pytest.raises(UserError, match=r"Input/output error"):
            write(old, overwrite=True)
        assert not old.exists()
        for read in (resolve_checkpoint, open_hf_directory):
            with pytest.raises(UserError, match=rf"what was there is in {tmp_path}/\.out\.partial/old"):
                read(old)
        monkeypatch.undo()
        # The next run of any kind puts it back before it looks whether it may write.
        with pytest.raises(UserError, match="not empty"):
            write(old)
        assert tree(old) == OLD

    @pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
    def test_a_directory_that_cannot_be_renamed_is_filled(
        self, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        monkeypatch.setattr(os, "rename", refuse(number, lambda source, target: old in (source, target)))
        inode = old.stat().st_ino
        write(old, overwrite=True)
        assert tree(old) == NEW and old.stat().st_ino == inode and list(tmp_path.iterdir()) == [old]


class TestInPlace:
    """Mount points and others that cannot be renamed."""

    def test_empty_volume(self, mounted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (mounted / "lost+found").mkdir()
        with atomic_directory(mounted, last=LAST) as partial:
            assert mounted in partial.parents
            assert "volume: is a mount point; it will be filled in place, config.json last" in capsys.readouterr().err
            fill(partial)
        assert tree(mounted) == NEW and (mounted / "lost+found").is_dir()
        assert [path.name for path in tmp_path.iterdir()] == ["volume"]

    def test_full_volume_is_refused(self, mounted: Path) -> None:
        fill(mounted, "old")
        with pytest.raises(UserError, match="not empty"):
            write(mounted)
        assert tree(mounted) == dict.fromkeys(NEW, "old")

    def test_order(self, mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a reader sees after each rename: the old whole, or no config.json, or the new whole."""
        fill(mounted, "old")
        (mounted / "extra").write_text("old")
        rename, states = os.rename, []

        def watching(source: Path, target: Path) -> None:
            rename(source, target)
            states.append({path.name: path.read_text() for path in mounted.iterdir() if path.is_file()})

        monkeypatch.setattr(renaming, "_system_call", lambda: None)
        monkeypatch.setattr(os, "rename", watching)
        write(mounted, overwrite=True)
        assert tree(mounted) == NEW
        seen = [state.get("config.json") for state in states]
        assert seen[0] is None and seen[-1] == "new" and set(seen[:-1]) == {None}

    @pytest.mark.parametrize("step", range(7))
    def test_a_failing_step_is_undone(
        self, mounted: Path, monkeypatch: pytest.MonkeyPatch, step: int, tmp_path: Path
    ) -> None:
        fill(mounted, "old")
        (mounted / "extra").write_text("old")
        count = [0]

        def nth(source: Path, target: Path) -> bool:
            count[0] += 1
            return count[0] == step + 1

        monkeypatch.setattr(renaming, "_system_call", lambda: None)
        monkeypatch.setattr(os, "rename", refuse(errno.EIO, nth, 1))
        with pytest.raises(UserError, match=r"complete in .*volume\.finished"):
            write(mounted, overwrite=True)
        assert tree(mounted) == OLD | {f"volume.finished/{name}": "new" for name in NEW}

    def test_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        inode = tmp_path.stat().st_ino
        write(Path())
        assert tree(tmp_path) == NEW and tmp_path.stat().st_ino == inode

    def test_parent_that_cannot_be_written_to(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "out").mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        with atomic_directory(tmp_path / "out") as partial:
            assert tmp_path / "out" in partial.parents
            fill(partial)
        assert tree(tmp_path / "out") == NEW

    def test_a_place_that_cannot_be_written_to(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def read_only(path: Path, *_: object, **__: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        (tmp_path / "file").write_text("mine")
        with pytest.raises(NotADirectoryError, match=r"Not a directory: '.*/file/out'"):
            write(tmp_path / "file" / "out")
        monkeypatch.setattr(os, "mkdir", read_only)
        with pytest.raises(OSError, match=r"Read-only file system: '.*/new/out'"):
            write(tmp_path / "new" / "out")
        assert tree(tmp_path) == {"file": "mine"}

    def test_a_volume_inside_is_refused(self, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(output_directory, "mount_points_below", lambda path: [path / "sub"])
        with pytest.raises(UserError, match=r"a file system is mounted in it, at .*out/sub"):
            write(old, overwrite=True)


@contextlib.contextmanager
def volume(place: Path, *words: str) -> Iterator[Path]:
    """A real mount."""
    place.mkdir()
    if subprocess.run(["mount", *words, str(place)], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kind", ["another disk", "bind"])
def test_real_mount(tmp_path: Path, kind: str) -> None:
    (tmp_path / "host").mkdir()
    words = ("-t", "tmpfs", "tmpfs") if kind == "another disk" else ("--bind", str(tmp_path / "host"))
    with volume(tmp_path / "with space", *words) as out:
        write(out)
        assert tree(out) == NEW
        (out / "extra").write_text("old")
        write(out, overwrite=True)
        assert tree(out) == NEW
        with pytest.raises(UserError, match="a file system is mounted in it"):
            write(tmp_path, overwrite=True)
        assert tree(out) == NEW


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_moe_lpr.files import moving_in
from megatron_moe_lpr.files import output_directory
from megatron_moe_lpr.files import renaming

target, step, in_place, without = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True", sys.argv[4] == "True"
if in_place:
    output_directory.is_mount_point = lambda path: path == target
count = [0]

def counting(function):
    def call(*arguments, **names):
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **names)
        count[0] += function.__name__ != "exchange" or result
        return result
    return call

with output_directory.atomic_directory(target, True, ("config.json",)) as partial:
    for name in ("config.json", "weights"):
        (partial / name).write_text("new")
    (partial / "sub").mkdir()
    (partial / "sub" / "file").write_text("new")
    if without:
        renaming._system_call = lambda: None
    os.rename = counting(os.rename)
    output_directory.exchange = counting(output_directory.exchange)
    moving_in.rename_without_replacing = counting(moving_in.rename_without_replacing)
    output_directory.rename_without_replacing = counting(output_directory.rename_without_replacing)
    moving_in.forget = counting(moving_in.forget)
    import shutil
    shutil.rmtree = counting(shutil.rmtree)
"""


@pytest.mark.parametrize(
    ("in_place", "without", "steps"), [(False, False, 2), (False, True, 3), (True, True, 12), (True, False, 9)]
)
def test_killed_before_each_step(in_place: bool, without: bool, steps: int, tmp_path: Path) -> None:
    """After the next start, whatever it does, the target is the old whole or the new whole, and nothing is left."""
    seen = []
    for step in range(steps):
        target = tmp_path / str(step) / "out"
        target.mkdir(parents=True)
        fill(target, "old")
        (target / "extra").write_text("old")
        words = [sys.executable, "-c", KILLED, str(target), str(step), str(in_place), str(without)]
        code = subprocess.run(words, check=False, timeout=60, env=os.environ).returncode
        assert code in (-signal.SIGKILL, 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(output_directory, "is_mount_point", lambda path, out=target: in_place and path == out)
            with pytest.raises(UserError, match="not empty"):
                write(target)
        assert tree(target) in (OLD, NEW), step
        assert list(target.parent.iterdir()) == [target]
        seen.append((code, tree(target) == NEW))
    assert seen[0] == (-signal.SIGKILL, False) and seen[-1][1], seen


def test_what_a_kill_while_writing_left_is_removed_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / ".out.partial"
    (work / "content").mkdir(parents=True)
    (work / "content" / "half").write_text("half")
    (work / "lock").write_text("process 1 on host")
    write(tmp_path / "out")
    assert ".out.partial: left by a run that was killed; removed" in capsys.readouterr().err
    assert tree(tmp_path / "out") == NEW and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["[]", '{"old": ["../../x"], "new": []}', '{"old": 1, "new": []}'])
def test_a_damaged_record_is_not_followed(tmp_path: Path, text: str) -> None:
    work = tmp_path / ".out.partial"
    (work / "old").mkdir(parents=True)
    (work / moving_in.RECORD).write_text(text)
    with pytest.raises(UserError, match=r"moves\.json: "):
        write(tmp_path / "out")
    assert (work / "old").is_dir()


def test_something_else_at_the_name_of_the_work_directory(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "content").write_text("mine")
    (tmp_path / ".out.partial").symlink_to("elsewhere")
    with pytest.raises(UserError, match=r"\.out\.partial: in the way"):
        write(tmp_path / "out")
    assert tree(tmp_path / "elsewhere") == {"content": "mine"}


def test_runs_with_names_of_their_own_clear_up_after_killed_ones_alone(tmp_path: Path) -> None:
    with work_directory.unique_work_directory(tmp_path, "x") as first:
        (first / "half").write_text("alive")
        dead = tmp_path / ".x.partial-0"
        (dead / "content").mkdir(parents=True)
        with work_directory.unique_work_directory(tmp_path, "x") as second:
            assert first != second and (first / "half").exists() and not dead.exists()
    assert list(tmp_path.iterdir()) == []
