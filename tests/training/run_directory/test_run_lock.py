"""One writer a directory: who is refused, who may take over."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_moe_lpr import processes
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.training.run_directory import lock_file
from megatron_moe_lpr.training.run_directory import run_lock as module
from megatron_moe_lpr.training.run_directory.lock_file import LockFile
from megatron_moe_lpr.training.run_directory.lock_holder import has_ended, this_process
from megatron_moe_lpr.training.run_directory.run_lock import LOCK_FILE, acquire, read_lock, run_lock

ENDED = subprocess.Popen([sys.executable, "-c", ""])
ENDED.wait()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "WATCH_SECONDS", 1.0)
    monkeypatch.setattr(lock_file, "REFRESH_SECONDS", 0.1)


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


def test_a_start_that_wrote_nothing_leaves_no_directory_of_its_own(tmp_path):
    for name, file, stays in (("new", None, False), ("written", "metrics.jsonl", True), ("given", None, True)):
        if name == "given":
            (tmp_path / name).mkdir()
        with pytest.raises(UserError, match="no such checkpoint"), run_lock(tmp_path / name):
            if file:
                (tmp_path / name / file).touch()
            raise UserError("no such checkpoint")
        assert (tmp_path / name).exists() == stays


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
        ({"boot": "before", "namespace": "other"}, False),  # booted since, or another machine of that name
        ({"process": 0}, True),  # kill(0) would ask for a whole group
        ({"namespace": "pid:[1]", "process": ENDED.pid}, False),  # a container, whose processes can't be seen
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "job": "7", "restart": 0}, True),  # SLURM has started this job again
        ({"host": "elsewhere", "job": "7", "restart": 1}, False),  # another step of the same start
        ({"host": "elsewhere", "job": "8", "restart": 0}, False),
        ({"host": "elsewhere", "job": "7", "cluster": "another"}, False),  # it counts its own jobs
        ({"host": "elsewhere", "process": ENDED.pid}, False),
    ],
)
def test_whether_a_holder_has_certainly_ended(changes, ended):
    observer = dataclasses.replace(this_process(), job="7", restart=1, cluster="one")
    assert has_ended(dataclasses.replace(this_process(), **changes), observer) == ended


def test_a_dead_holder_on_this_host_is_replaced_and_another_hosts_only_when_told(tmp_path, capfd):
    dead = write(tmp_path / "run", process=ENDED.pid)
    acquire(tmp_path / "run")
    assert f"taken over from {dead}" in capfd.readouterr().err
    write(tmp_path / "run", host="elsewhere")
    with pytest.raises(UserError, match="--take-over"):
        acquire(tmp_path / "run")
    acquire(tmp_path / "run", take_over=True).release()
    assert read_lock(tmp_path / "run" / LOCK_FILE) is None


def test_a_node_that_torchrun_has_lost_leaves_its_lock_to_the_others_of_its_launch(tmp_path, monkeypatch, capfd):
    lost = write(tmp_path / "run", host="elsewhere", launch="run7")
    for other in ("run8", "none", None):  # "none" is what torchrun calls a launch without a name
        if other:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", other)
        with pytest.raises(UserError, match="--take-over"):
            acquire(tmp_path / "run")
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run7")
    acquire(tmp_path / "run").release()
    assert f"taken over from {lost}" in capfd.readouterr().err


def test_a_node_that_torchrun_takes_for_lost_keeps_its_lock_while_it_lives(tmp_path, monkeypatch):
    lost = write(tmp_path / "run", host="elsewhere", launch="run7")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run7")
    over = threading.Event()

    def refresh() -> None:
        while not over.wait(0.05):
            os.utime(tmp_path / "run" / LOCK_FILE)

    refreshing = threading.Thread(target=refresh)
    refreshing.start()
    try:
        with pytest.raises(UserError, match="writes there"):
            acquire(tmp_path / "run")
    finally:
        over.set()
        refreshing.join()
    assert read_lock(tmp_path / "run" / LOCK_FILE) == lost


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


OTHER_MACHINE = {"boot": "of another machine"}
OTHER_CONTAINER = {"namespace": "pid:[1]"}

HOLD = """
import dataclasses, sys, time
from pathlib import Path
from megatron_moe_lpr.training.run_directory import lock_file
from megatron_moe_lpr.training.run_directory import run_lock

lock_file.REFRESH_SECONDS = 0.1
here = run_lock.this_process
changes = dict(part.split("=", 1) for part in sys.argv[2:])
run_lock.this_process = lambda: dataclasses.replace(here(), **changes)
lock = run_lock.acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
lock.check()
print("still its own", flush=True)
"""


@pytest.fixture
def hold(tmp_path):
    """Start a process that holds the lock of tmp_path, as if it were elsewhere."""
    started = []

    def start(changes):
        arguments = [f"{name}={value}" for name, value in changes.items()]
        command = [sys.executable, "-c", HOLD, str(tmp_path), *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("take_over", [False, True])
@pytest.mark.parametrize("changes", [{}, OTHER_MACHINE, OTHER_CONTAINER, OTHER_MACHINE | OTHER_CONTAINER])
def test_a_live_run_of_this_host_name_keeps_its_lock(changes, take_over, hold, tmp_path):
    """Also on a cloned machine, or in a container, with the same name."""
    holder = hold(changes)
    with pytest.raises(UserError, match=rf"process {holder.pid} on .* writes there"):
        acquire(tmp_path, take_over)
    out, _ = holder.communicate("\n", timeout=60)
    assert out == "still its own\n" and holder.returncode == 0


def test_a_live_run_of_another_host_keeps_its_lock_also_from_take_over(hold, tmp_path):
    holder = hold({"host": "elsewhere"})
    with pytest.raises(UserError, match="pass --take-over"):
        acquire(tmp_path)
    with pytest.raises(UserError, match=rf"process {holder.pid} on elsewhere.* writes there"):
        acquire(tmp_path, take_over=True)


@pytest.mark.parametrize("changes", [{}, OTHER_MACHINE, OTHER_CONTAINER, OTHER_MACHINE | OTHER_CONTAINER])
def test_a_killed_run_of_this_host_name_is_replaced_without_help(changes, hold, tmp_path, capfd):
    """After a reboot, or a new start of the container: nobody refreshes its lock."""
    holder = hold(changes)
    holder.kill()
    holder.wait()
    acquire(tmp_path).release()
    said = capfd.readouterr().err
    assert f"taken over from process {holder.pid} on " in said
    assert ("waiting 1 s to see whether" in said) == bool(changes)


def test_a_stopped_run_is_alive(hold, tmp_path):
    """It refreshes nothing, but this kernel knows its lock, whatever the container."""
    holder = hold(OTHER_CONTAINER)
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="writes there"):
        acquire(tmp_path, take_over=True)


def test_a_process_that_proc_hides_is_not_dead(hold, tmp_path, monkeypatch):
    """As with hidepid=2 for another user's: no /proc/PID, and no permission to send it a signal."""
    holder = hold({})
    with hidden(monkeypatch), pytest.raises(UserError, match=rf"process {holder.pid} on .* writes there"):
        acquire(tmp_path)


def test_a_hidden_process_without_a_lock_has_the_number_of_one_that_ended(tmp_path, monkeypatch):
    write(tmp_path, flock=True)
    with hidden(monkeypatch):
        acquire(tmp_path).release()


def test_where_the_file_system_has_no_locks_a_hidden_process_may_be_alive(tmp_path, monkeypatch):
    write(tmp_path)
    with hidden(monkeypatch):
        with pytest.raises(UserError, match="may still write there"):
            acquire(tmp_path)
        acquire(tmp_path, take_over=True).release()


@contextlib.contextmanager
def hidden(monkeypatch):
    """All processes are another user's, and /proc shows none of them."""

    def refuse(process, number):
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(processes, "_stat_fields", lambda process: None)
        patch.setattr(os, "kill", refuse)
        yield


@pytest.mark.parametrize("without", ["flock", "refreshed"])
def test_a_lock_without_signs_of_life_is_taken_over_only_when_told(without, tmp_path):
    """An earlier version's, say: whether its run is alive cannot be seen from another boot or container."""
    changes = OTHER_CONTAINER if without == "flock" else OTHER_MACHINE
    write(tmp_path, **changes, **{without: False})
    with pytest.raises(UserError, match="--take-over"):
        acquire(tmp_path)
    acquire(tmp_path, take_over=True).release()


def test_a_lock_that_is_released_while_it_is_watched_is_free(tmp_path):
    write(tmp_path, **OTHER_MACHINE)
    threading.Timer(0.3, (tmp_path / LOCK_FILE).unlink).start()
    acquire(tmp_path).release()


def test_fields_of_a_later_version_are_left_aside(tmp_path):
    holder = write(tmp_path)
    fields = json.loads((tmp_path / LOCK_FILE).read_text())
    (tmp_path / LOCK_FILE).write_text(json.dumps(fields | {"rack": 7}))
    assert read_lock(tmp_path / LOCK_FILE) == holder


def test_a_forked_child_does_not_hold_its_parents_lock(tmp_path):
    file = LockFile(tmp_path / "lock")
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        assert lock_file.is_locked(tmp_path / "lock")
        os.close(file.descriptor)  # as at the end of this process
        lock_file._open_descriptors.discard(file.descriptor)
        deadline = time.monotonic() + 30
        while lock_file.is_locked(tmp_path / "lock") and time.monotonic() < deadline:
            time.sleep(0.01)  # the child may not have come to close its own
        assert lock_file.is_locked(tmp_path / "lock") is False
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
