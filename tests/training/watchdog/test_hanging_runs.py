"""Runs of one process whose disk, writer, index building or evaluation stands still end and say so."""

import multiprocessing
import os
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed import PRELOADED
from tests.training.runs import make_checkpoint, make_data, train

TIMEOUT = 8.0
DOING = {
    "writer": ("step 2", "waiting for the checkpoint writer, process "),
    "disk": ("step 2", "saving step 2 to "),
    "name": ("step 2", "saving step 2 to "),
    "lock": ("step 0", "at stand_still"),
    "index": ("step 0", "building index maps in "),
    "evaluation": ("step 2", "reading a batch of ValidationDataset in this process"),
}
"""What stands still, and what the error says of it."""


def stand_still(*_, **__) -> None:
    time.sleep(300)


def suspend_the_writer(saver, *_) -> None:
    psutil.Process(saver.background.process.pid).suspend()


def hang(how: str, root: Path) -> None:
    """A run in a process of its own, whose errors go to a file."""
    from megatron_moe_lpr.checkpoint.saving import saver as saving
    from megatron_moe_lpr.data.reading import training_dataset, validation_dataset
    from megatron_moe_lpr.files import checksums as integrity
    from megatron_moe_lpr.training import run_saver
    from megatron_moe_lpr.training.run_directory import run_lock
    from megatron_moe_lpr.training.watchdog import heartbeat

    os.dup2(os.open(root / f"{how}.err", os.O_WRONLY | os.O_CREAT), 2)
    original, save = heartbeat.Heartbeat.__init__, root / how
    heartbeat.Heartbeat.__init__ = lambda watch, timeout: original(watch, TIMEOUT)
    options = {"train_iters": 2, "async_save": how != "disk", "tensorboard_dir": save / "tb"}
    if how == "writer":
        run_saver.expect_saves = suspend_the_writer
    elif how == "disk":
        integrity.ChecksumStream.close = stand_still
    elif how == "lock":
        run_lock.atomic_file = stand_still
    elif how == "name":
        saving.finish_iteration = stand_still
    elif how == "index":
        training_dataset.are_intact = stand_still
        options["data_cache_path"] = str(save / "cache")
    else:
        validation_dataset.ValidationDataset.__getitem__ = stand_still
        options["valid_data_path"] = [str(root / "el")]
    train(root / "checkpoint", save, {name: str(root / name) for name in ("el", "hu", "en")}, **options)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Exit code, errors and --save of each run; all at once, since they mostly wait."""
    root = tmp_path_factory.mktemp("hanging")
    make_checkpoint(root)
    make_data(root)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    runs = {how: context.Process(target=hang, args=(how, root)) for how in DOING}
    for process in runs.values():
        process.start()
    for process in runs.values():
        process.join(250)
        process.kill()
    return {how: (process.exitcode, (root / f"{how}.err").read_text(), root / how) for how, process in runs.items()}


@pytest.mark.parametrize("how", DOING)
def test_the_line_says_what_stands_still_and_the_stack_where(how, ended):
    code, errors, save = ended[how]
    assert code == 1, errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    step, doing = DOING[how]
    assert len(lines) == 1 and lines[0].startswith(f"error: {step}: rank 0 hangs {doing}"), errors
    assert "no progress for" in lines[0]
    assert ("readline" if how == "writer" else "in stand_still") in errors
    assert not (save / "run.lock").exists()
    assert bool(list(save.glob("iter_*"))) == (how == "evaluation")
