"""What is no proof of damage ends the run in a reason and changes nothing; proven damage sets one checkpoint aside."""

import builtins
import contextlib
import errno
import functools
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_moe_lpr.checkpoint.format.directory import LATEST_FILE, write_latest
from megatron_moe_lpr.files.checksums import MANIFEST, write_manifest
from tests.distributed import rank_pool
from tests.training.outcomes import train_outcome
from tests.training.runs import make_checkpoint, make_data, metrics, rewind
from tests.training.test_damage import flip

SAVES = {"train_iters": 8, "save_interval": 2}
CARD = Path("moe_lpr", "card.json")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A finished run of four checkpoints, steps 2 to 8, on two ranks."""
    root = tmp_path_factory.mktemp("condemned")
    load, data = make_checkpoint(root), make_data(root)
    assert rank_pool(2).run(functools.partial(train_outcome, load, root / "run", data, **SAVES)) == [None, None]
    return load, data, root / "run"


@pytest.fixture
def save(setting, tmp_path):
    return shutil.copytree(setting[2], tmp_path / "run")


def content(save: Path) -> dict[str, bytes]:
    """Every file of the run that a checkpoint or a log is made of."""
    files = {path.relative_to(save).as_posix(): path for path in save.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".")}


@contextlib.contextmanager
def failing(name: str, error: Exception | None, times: int, hidden: bool) -> Iterator[None]:
    """Reads of files whose path ends in `name`, or lies below it, fail; `error` None: they give other bytes."""
    left = [times]
    opened, stat = builtins.open, os.stat

    def is_meant(path: object) -> bool:
        if not isinstance(path, str | os.PathLike) or f"{name}/" not in f"{os.fspath(path)}/" or not left[0]:
            return False
        left[0] -= 1
        return True

    def open_or_fail(path, mode="r", *arguments, **options):
        if "r" not in mode or not is_meant(path):
            return opened(path, mode, *arguments, **options)
        if error is not None:
            error.filename = os.fspath(path)
            raise error
        with opened(path, "rb") as file:
            read = bytearray(file.read())
        read[len(read) // 2] ^= 1
        return io.BytesIO(bytes(read))

    def stat_or_fail(path, *arguments, **options):
        if hidden and is_meant(path):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", os.fspath(path))
        return stat(path, *arguments, **options)

    with (
        mock.patch.object(builtins, "open", open_or_fail),
        mock.patch.object(io, "open", open_or_fail),
        mock.patch.object(os, "stat", stat_or_fail),
    ):
        yield


def outcome_on_a_failing_rank(name, error, times, hidden, *arguments, **changes) -> str | None:
    """On every rank of a pool: how a run ends while rank 1 cannot read what it should."""
    is_failing = failing(name, error, times, hidden) if dist.get_rank() == 1 else contextlib.nullcontext()
    try:
        with is_failing:
            return train_outcome(*arguments, **changes)
    except (RuntimeError, MemoryError) as defect:
        return repr(defect)


ALWAYS = sys.maxsize
NOT_FOUND = FileNotFoundError(errno.ENOENT, "No such file or directory")
FAILURES = {
    "card, EIO": ("iter_0000008/moe_lpr/card.json", OSError(errno.EIO, "Input/output error"), ALWAYS, False),
    "manifest, EACCES": (f"iter_0000008/{MANIFEST}", PermissionError(errno.EACCES, "Permission denied"), ALWAYS, False),
    "tensors, EIO": ("iter_0000008/__0_0.distcp", OSError(errno.EIO, "Input/output error"), ALWAYS, False),
    "tensors, EIO once": ("iter_0000008/__1_0.distcp", OSError(errno.EIO, "Input/output error"), 1, False),
    "index, ESTALE": ("iter_0000008/.metadata", OSError(errno.ESTALE, "Stale file handle"), ALWAYS, False),
    "common.pt, ENOMEM": ("iter_0000008/common.pt", OSError(errno.ENOMEM, "Cannot allocate memory"), ALWAYS, False),
    "config, ETIMEDOUT": (
        "iter_0000008/moe_lpr/config.json",
        OSError(errno.ETIMEDOUT, "Connection timed out"),
        ALWAYS,
        False,
    ),
    "a directory that one rank does not see": ("iter_0000008", NOT_FOUND, ALWAYS, True),
    "a file that one rank does not see": ("iter_0000008/common.pt", NOT_FOUND, ALWAYS, True),
    "a manifest that one rank does not see": (f"iter_0000008/{MANIFEST}", NOT_FOUND, ALWAYS, True),
    "a defect": ("iter_0000008/common.pt", RuntimeError("a defect"), ALWAYS, False),
    "memory": ("iter_0000008/common.pt", MemoryError(), ALWAYS, False),
    "other bytes": ("iter_0000008/common.pt", None, ALWAYS, False),
    "other bytes once": ("iter_0000008/common.pt", None, 1, False),
    "another manifest": (f"iter_0000008/{MANIFEST}", None, ALWAYS, False),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_one_rank_cannot_read_changes_nothing(name, setting, save):
    load, data, _ = setting
    before = content(save)
    task = functools.partial(outcome_on_a_failing_rank, *FAILURES[name], load, save, data, **SAVES)
    first, second = rank_pool(2).run(task)
    assert "rank 1" in first and second, (first, second)
    assert content(save) == before


@pytest.mark.parametrize("target", ["not-mounted/__0_0.distcp", "__0_0.distcp"])
def test_a_link_that_leads_to_no_file_is_no_damage(target, setting, save):
    file = save / "iter_0000008" / "__0_0.distcp"
    file.unlink()
    file.symlink_to(target)
    before = content(save)
    assert "is what it leads to mounted here?" in go(setting, save)
    assert content(save) == before


def go(setting, save, **changes) -> str | None:
    load, data, _ = setting
    outcomes = rank_pool(2).run(functools.partial(train_outcome, load, save, data, **(SAVES | changes)))
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


def change_card(save: Path, iteration: int, summed: bool, **fields) -> None:
    directory = save / f"iter_{iteration:07d}"
    card = json.loads((directory / CARD).read_text())
    (directory / CARD).write_text(json.dumps(card | fields))
    if summed:
        write_manifest(directory, {})


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_a_newer_format_is_refused(summed, verify, setting, save):
    change_card(save, 8, summed, format_version=99, colour="new")
    before = content(save)
    error = go(setting, save, verify=verify)
    assert "format_version 99" in error and "install a newer" in error
    assert content(save) == before


def test_a_newer_format_behind_a_damaged_checkpoint_is_refused(setting, save):
    flip(save / "iter_0000008" / "common.pt")
    change_card(save, 6, True, format_version=99)
    before = content(save)
    assert "format_version 99" in go(setting, save)
    assert content(save) == before


def other_form(iteration: Path) -> None:
    manifest = json.loads((iteration / MANIFEST).read_text())
    (iteration / MANIFEST).write_text(json.dumps(manifest | {"algorithm": "xxh4"}))


def more_in_entries(iteration: Path) -> None:
    manifest = json.loads((iteration / MANIFEST).read_text())
    manifest["files"] = {name: entry | {"owner": 0} for name, entry in manifest["files"].items()}
    (iteration / MANIFEST).write_text(json.dumps(manifest))


UNPROVEN = {
    "an unknown field in the card": (
        lambda iteration: change_card(iteration.parent, 8, True, colour="new"),
        "not a valid card",
    ),
    "a value that no card has": (lambda iteration: change_card(iteration.parent, 8, True, top_k=99), "top_k"),
    "a manifest of another algorithm": (other_form, "install the version"),
    "a manifest with more in its entries": (more_in_entries, "install the version"),
    "a file beside the card": (lambda iteration: (iteration / "moe_lpr" / ".nfs01").touch(), ".nfs01: not in"),
    "an empty directory, as a mount point is": (
        lambda iteration: (shutil.rmtree(iteration), iteration.mkdir()),
        "proves no damage",
    ),
    "a link that leads nowhere": (
        lambda iteration: (shutil.rmtree(iteration), iteration.symlink_to("elsewhere")),
        "proves no damage",
    ),
    "no directory": (shutil.rmtree, "which is not there"),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_what_proves_no_damage_is_refused(name, setting, save):
    change, words = UNPROVEN[name]
    change(save / "iter_0000008")
    before = content(save)
    assert words in go(setting, save)
    assert content(save) == before and (save / LATEST_FILE).read_text() == "8"


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "__0_0.distcp", str(MANIFEST)])
def test_damage_that_all_ranks_see_sets_one_aside(name, setting, save):
    """Cut short; the manifest then parses no more."""
    path = save / "iter_0000008" / name
    path.write_bytes(path.read_bytes()[:-5])
    assert go(setting, save) is None
    assert (save / "damaged-iter_0000008").is_dir() and (save / LATEST_FILE).read_text() == "8"
    assert sorted(metrics(save)) == list(range(1, 9))


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_file_that_all_ranks_miss_sets_one_aside(name, setting, save):
    (save / "iter_0000008" / name).unlink()
    assert go(setting, save) is None
    assert (save / "damaged-iter_0000008").is_dir()


def test_a_card_without_a_manifest_that_is_no_json_sets_one_aside(setting, save):
    (save / "iter_0000008" / MANIFEST).unlink()
    (save / "iter_0000008" / CARD).write_text("{")
    assert go(setting, save) is None
    assert (save / "damaged-iter_0000008").is_dir()


def test_more_than_one_takes_a_word(setting, save):
    for iteration in (8, 6):
        flip(save / f"iter_{iteration:07d}" / "common.pt")
    before = content(save)
    error = go(setting, save)
    assert "2 damaged checkpoints (iter_0000008, iter_0000006)" in error and "--fall-back-to 4" in error
    assert "--fall-back-to 4" in go(setting, save, fall_back_to=5)
    assert content(save) == before
    assert go(setting, save, fall_back_to=4) is None
    assert {path.name for path in save.glob("damaged-*")} == {"damaged-iter_0000008", "damaged-iter_0000006"}
    assert (save / LATEST_FILE).read_text() == "8"


def test_no_loop_of_starts_sets_one_aside_after_the_other(setting, save, tmp_path):
    """Each start finds one damaged, and dies before it saves again."""
    flip(save / "iter_0000008" / "common.pt")
    assert go(setting, save) is None
    stopped = rewind(save, tmp_path / "stopped", 6)
    for name in ("iter_0000004", "damaged-iter_0000008"):
        shutil.copytree(save / name, stopped / name)
    flip(stopped / "iter_0000006" / "common.pt")
    before = content(stopped)
    assert "iter_0000006, damaged-iter_0000008" in go(setting, stopped)
    assert content(stopped) == before


def test_a_latest_file_that_names_an_old_one_takes_a_word(setting, save):
    """One flipped bit makes such a number. One newer checkpoint may be there: killed before the latest file."""
    (save / LATEST_FILE).write_text("2")
    before = content(save)
    error = go(setting, save)
    assert "3 newer checkpoints" in error and f"echo 8 > '{save / LATEST_FILE}'" in error
    assert content(save) == before
    write_latest(save, 6)
    assert go(setting, save) is None
    write_latest(save, 2)
    assert go(setting, save, fall_back_to=2) is None


def test_killed_at_the_end_of_the_first_save(setting, save):
    """The directory has its name, and no file says which is the latest."""
    for iteration in (4, 6, 8):
        shutil.rmtree(save / f"iter_{iteration:07d}")
    (save / LATEST_FILE).unlink()
    assert go(setting, save, fall_back=False) is None
    assert (save / LATEST_FILE).read_text() == "8" and sorted(metrics(save)) == list(range(1, 9))


def test_a_first_save_of_another_run_is_not_taken(setting, save):
    for iteration in (4, 6, 8):
        shutil.rmtree(save / f"iter_{iteration:07d}")
    (save / LATEST_FILE).unlink()
    assert "another run" in go(setting, save, seed=99)
    assert not (save / LATEST_FILE).exists()
