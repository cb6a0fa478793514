"""Which checkpoints stay, and that removing never shows half of one or takes one from its reader."""

import subprocess
import sys
import threading

import pytest

from megatron_moe_lpr.checkpoint.format import retention
from megatron_moe_lpr.checkpoint.format.directory import finish_iteration
from megatron_moe_lpr.checkpoint.format.retention import Retention, being_read, remove_hidden, remove_superfluous
from megatron_moe_lpr.errors import UserError
from tests.checkpoint.format.test_directory import make_iteration


def save(root, iteration, rule, kept=()):
    finish_iteration(make_iteration(root / "partial"), root, iteration)
    # Other tests leave threads that never end, such as tqdm's monitor.
    before = set(threading.enumerate())
    notes = remove_superfluous(root, iteration, rule, kept)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    return notes


def left(root):
    return sorted(int(path.name[5:]) for path in root.glob("iter_*"))


@pytest.mark.parametrize(
    "rule, expected",
    [
        (Retention(), [10, 20, 30, 40, 50]),
        (Retention(last=1), [50]),
        (Retention(last=3), [30, 40, 50]),
        (Retention(last=9), [10, 20, 30, 40, 50]),
        (Retention(interval=20), [20, 40, 50]),
        (Retention(interval=20, last=1), [20, 40, 50]),
        (Retention(interval=30), [30, 40, 50]),
        (Retention(interval=20, last=3), [20, 30, 40, 50]),
    ],
)
def test_the_rule(rule, expected, tmp_path):
    for iteration in (10, 20, 30, 40, 50):
        assert save(tmp_path, iteration, rule) == []
    assert left(tmp_path) == expected
    assert not list(tmp_path.glob(".iter*"))


def test_newer_ones_are_not_touched(tmp_path):
    """A run started again from an earlier checkpoint: what lies after it is not older than anything."""
    for iteration in (10, 20, 30):
        save(tmp_path, iteration, Retention())
    save(tmp_path, 15, Retention(last=1))
    assert left(tmp_path) == [15, 20, 30]


def test_the_start_of_the_run_stays(tmp_path):
    for iteration in (10, 20, 30):
        save(tmp_path, iteration, Retention(last=1), kept=[tmp_path / "iter_0000010"])
    assert left(tmp_path) == [10, 30]


def test_one_that_is_read_goes_later(tmp_path):
    """The reader is another process, as an evaluation is."""
    save(tmp_path, 10, Retention())
    code = (
        "import sys; from pathlib import Path; from megatron_moe_lpr.checkpoint.format.retention import being_read\n"
        "with being_read(Path(sys.argv[1])): print('reading', flush=True); sys.stdin.read()"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "iter_0000010"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert reader.stdout.readline() == b"reading\n"
    (note,) = save(tmp_path, 20, Retention(last=1))
    assert note == f"{tmp_path / 'iter_0000010'}: kept, it is being read"
    assert left(tmp_path) == [10, 20]
    reader.communicate()
    assert save(tmp_path, 30, Retention(last=1)) == []
    assert left(tmp_path) == [30]


def test_a_reader_that_comes_too_late_is_told(tmp_path):
    with (
        pytest.raises(UserError, match="iter_0000010: was removed by the run that wrote it"),
        being_read(tmp_path / "iter_0000010"),
    ):
        raise AssertionError


def test_killed_while_it_deletes(tmp_path, monkeypatch):
    """What is left of the directory is hidden, and goes the next time."""
    save(tmp_path, 10, Retention())

    def die(path, **options):
        if path.exists():
            (path / ".metadata").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", die)
        patch.setattr(threading.Thread, "start", threading.Thread.run)
        finish_iteration(make_iteration(tmp_path / "partial"), tmp_path, 20)
        with pytest.raises(KeyboardInterrupt):
            remove_superfluous(tmp_path, 20, Retention(last=1))
    assert left(tmp_path) == [20]
    assert [path.name for path in tmp_path.glob(".iter*")] == [".iter_0000010.removed"]
    remove_hidden(tmp_path)
    assert not list(tmp_path.glob(".iter*"))


@pytest.mark.parametrize(
    "rule, save_interval, words",
    [
        (Retention(last=0), 10, "--keep-last-checkpoints 0"),
        (Retention(interval=0), 10, "--save-retain-interval 0"),
        (Retention(interval=25), 10, "multiple of --save-interval"),
        (Retention(interval=25), None, "not given"),
    ],
)
def test_rules_that_make_no_sense(rule, save_interval, words):
    with pytest.raises(UserError, match=words):
        rule.check(save_interval)
