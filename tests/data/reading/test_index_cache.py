"""Index maps that several runs build at the same moment, and what killed ones leave."""

import fcntl
import os
import time
from pathlib import Path

import pytest

from megatron_moe_lpr.data.reading import training_dataset
from megatron_moe_lpr.data.reading.config import DataConfig, read_data_sources
from megatron_moe_lpr.data.reading.index_cache import OLD_SECONDS, YOUNG_SECONDS, build_directory
from megatron_moe_lpr.errors import UserError
from tests.data.builders import numbered_dataset


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    prefixes = [numbered_dataset(tmp_path / name, name, base, 50) for name, base in (("en", 1000), ("el", 3000))]
    return DataConfig(data_path=prefixes, data_cache_path=str(tmp_path / "cache"))


def build(config: DataConfig) -> list[list[int]]:
    dataset = training_dataset.build_training_dataset(read_data_sources(config), config, 32, 40)
    return [dataset[index]["tokens"].tolist() for index in range(40)]


def inodes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (directory, *directory.rglob("*"))}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def while_building(config: DataConfig, monkeypatch: pytest.MonkeyPatch, action) -> list[list[int]]:
    """Build, and do something between the last map and the publication."""
    write_checksums = training_dataset.write_checksums

    def write_and_act(*arguments: object) -> None:
        write_checksums(*arguments)
        monkeypatch.setattr(training_dataset, "write_checksums", write_checksums)
        action()

    monkeypatch.setattr(training_dataset, "write_checksums", write_and_act)
    return build(config)


def test_the_first_of_two_runs_keeps_its_maps(config: DataConfig, tmp_path: Path, monkeypatch) -> None:
    found = []

    def other_run() -> None:
        found.append(build(config))
        (directory,) = (path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))
        found.append(inodes(directory))

    assert while_building(config, monkeypatch, other_run) == found[0]
    (directory,) = (tmp_path / "cache").iterdir()
    assert inodes(directory) == found[1]


def test_damaged_maps_are_replaced_in_their_directory(config: DataConfig, tmp_path: Path, capsys) -> None:
    """At no moment is the directory, or one of its files, missing to a run that reads it."""
    expected = build(config)
    (directory,) = (tmp_path / "cache").iterdir()
    before = inodes(directory)
    damage(next(directory.glob("*document_index.npy")))
    (directory / "foreign.npy").write_bytes(b"not a map")
    assert build(config) == expected and "built again" in capsys.readouterr().err
    assert before.keys() == inodes(directory).keys() and before[directory.name] == directory.stat().st_ino
    assert build(config) == expected and not capsys.readouterr().err
    assert list((tmp_path / "cache").iterdir()) == [directory]


def test_two_runs_that_replace_damaged_maps(config: DataConfig, tmp_path: Path, monkeypatch, capsys) -> None:
    expected = build(config)
    (directory,) = (tmp_path / "cache").iterdir()
    for path in directory.glob("*.npy"):
        damage(path)
    found = []

    def other_run() -> None:
        assert build(config) == expected
        found.append(inodes(directory))

    assert while_building(config, monkeypatch, other_run) == expected
    assert inodes(directory) == found[0] and list((tmp_path / "cache").iterdir()) == [directory]


def test_processes_at_the_same_moment(config: DataConfig, tmp_path: Path) -> None:
    expected = build(config)
    for number in range(3):
        config.data_cache_path = str(tmp_path / f"cache-{number}")
        at, children = time.time() + 0.3, []
        for _ in range(4):
            child = os.fork()
            if child == 0:
                while time.time() < at:
                    pass
                os._exit(0 if build(config) == expected else 1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
        assert len(os.listdir(config.data_cache_path)) == 1


def leftover(cache: Path, name: str, age: float, locked: bool) -> Path:
    path = cache / name
    (path / "maps").mkdir(parents=True)
    for each in ((path / "lock"), path) if locked else (path,):
        each.touch()
        os.utime(each, (time.time() - age,) * 2)
    return path


def test_leftovers_of_killed_runs_are_removed(config: DataConfig, tmp_path: Path) -> None:
    cache, key = tmp_path / "cache", ".0123456789abcdef"
    dead = leftover(cache, f"{key}.partial-1-a", 2 * YOUNG_SECONDS, locked=True)
    earlier = leftover(cache, f"{key}.partial-77", 2 * OLD_SECONDS, locked=False)
    moved = leftover(cache, f"{key}.old-77", 2 * OLD_SECONDS, locked=False)
    beginning = leftover(cache, f"{key}.partial-2-a", 0, locked=False)
    young = leftover(cache, f"{key}.partial-3-a", 0, locked=True)
    live = leftover(cache, f"{key}.partial-4-a", 2 * OLD_SECONDS, locked=True)
    foreign = leftover(cache, ".somebody.partial-1", 2 * OLD_SECONDS, locked=False)
    with open(live / "lock", "r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        build(config)
        assert not dead.exists() and not earlier.exists() and not moved.exists()
        assert all(path.exists() for path in (beginning, young, live, foreign))


def test_a_killed_run_s_lock_is_free(tmp_path: Path) -> None:
    """A process that dies while it builds leaves a directory, which the next one finds abandoned."""
    directory = tmp_path / "0123456789abcdef"
    child = os.fork()
    if child == 0:
        with build_directory(directory) as partial:
            (partial / "map").touch()
            os._exit(0)  # as a kill: nothing is cleaned up
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    os.utime(left / "lock", (time.time() - 2 * YOUNG_SECONDS,) * 2)
    with build_directory(directory) as partial:
        (partial / "map").touch()
    assert list(tmp_path.iterdir()) == [directory]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="why"), build_directory(tmp_path / "0123456789abcdef") as partial:
        (partial / "map").touch()
        raise UserError("why")
    assert not list(tmp_path.iterdir())
