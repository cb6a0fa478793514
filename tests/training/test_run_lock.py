"""One writer a directory: who is refused, who may take over."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.training.run_lock import LOCK_FILE, acquire, has_ended, read_lock, run_lock, this_process

ENDED = subprocess.Popen([sys.executable, "-c", ""])
ENDED.wait()


def write(directory, **changes):
    directory.mkdir(exist_ok=True)
    holder = dataclasses.replace(this_process(), **changes)
    (directory / LOCK_FILE).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def test_a_second_run_is_refused_by_name_and_the_end_releases(tmp_path):
    with run_lock(tmp_path / "run"):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* writes there"), run_lock(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / LOCK_FILE).exists()
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_also_take_over_does_not_take_it_from_a_process_that_lives_here(tmp_path):
    write(tmp_path / "run")
    with pytest.raises(UserError, match="writes there"):
        acquire(tmp_path / "run", take_over=True)


@pytest.mark.parametrize(
    ("changes", "ended"),
    [
        ({}, False),
        ({"process": ENDED.pid}, True),
        ({"start": 1.0}, True),  # the number belongs to another process by now
        ({"boot": "before", "namespace": "other"}, True),
        ({"namespace": "pid:[1]", "process": ENDED.pid}, False),  # a container, whose processes can't be seen
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "job": "7", "restart": 0}, True),  # SLURM has started this job again
        ({"host": "elsewhere", "job": "7", "restart": 1}, False),  # another step of the same start
        ({"host": "elsewhere", "job": "8", "restart": 0}, False),
    ],
)
def test_whether_a_holder_can_still_be_alive(changes, ended, tmp_path, capfd):
    asking = dataclasses.replace(this_process(), job="7", restart=1)
    assert has_ended(dataclasses.replace(this_process(), **changes), asking) == ended


def test_a_dead_holder_on_this_host_is_replaced_and_another_hosts_only_when_told(tmp_path, capfd):
    dead = write(tmp_path / "run", process=ENDED.pid)
    acquire(tmp_path / "run")
    assert f"taken over from {dead}" in capfd.readouterr().err
    write(tmp_path / "run", host="elsewhere")
    with pytest.raises(UserError, match="--take-over"):
        acquire(tmp_path / "run")
    acquire(tmp_path / "run", take_over=True).release()
    assert read_lock(tmp_path / "run" / LOCK_FILE) is None


def test_who_lost_the_lock_writes_no_more(tmp_path):
    lock = acquire(tmp_path / "run")
    lock.check()
    winner = write(tmp_path / "run", host="elsewhere")
    with pytest.raises(UserError, match=r"taken over by process .* on elsewhere"):
        lock.check()
    lock.release()
    assert read_lock(tmp_path / "run" / LOCK_FILE) == winner


def test_something_else_in_its_place_is_not_a_lock(tmp_path):
    (tmp_path / LOCK_FILE).write_text("{")
    with pytest.raises(UserError, match="not a lock"):
        acquire(tmp_path)


def test_other_ranks_need_none(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with run_lock(tmp_path / "run") as lock:
        lock.check()
    assert not (tmp_path / "run").exists()
