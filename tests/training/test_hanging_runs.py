"""Runs of one process whose disk, writer, index building or evaluation stands still end and say so."""

import os
import subprocess
import sys

import pytest

from tests.training.runs import make_checkpoint, make_data

TIMEOUT = 8.0
RUN = """
import sys, time
from pathlib import Path
import psutil
from megatron_moe_lpr.checkpoint import integrity, saving
from megatron_moe_lpr.data.reading import training_dataset, validation_dataset
from megatron_moe_lpr.training import heartbeat, loop
from tests.training.runs import train

how, root, save = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
original = heartbeat.Heartbeat.__init__
heartbeat.Heartbeat.__init__ = lambda watch, timeout, before_end: original(watch, TIMEOUT, before_end)

def stand_still(*_, **__):
    time.sleep(300)

def suspend_the_writer(saver, *_):
    psutil.Process(saver.background.process.pid).suspend()

options = {"train_iters": 2, "async_save": how != "disk", "tensorboard_dir": save / "tb"}
if how == "writer":
    loop.expect_saves = suspend_the_writer
elif how == "disk":
    integrity.os.fsync = stand_still
elif how == "name":
    saving.finish_iteration = stand_still
elif how == "index":
    training_dataset.are_intact = stand_still
    options["data_cache_path"] = str(save / "cache")
elif how == "evaluation":
    validation_dataset.ValidationDataset.__getitem__ = stand_still
    options["valid_data_path"] = [str(root / "el")]
train(root / "checkpoint", save, {name: str(root / name) for name in ("el", "hu", "en")}, **options)
"""
DOING = {
    "writer": ("step 2", "waiting for the checkpoint writer, process "),
    "disk": ("step 2", "saving step 2 to "),
    "name": ("step 2", "saving step 2 to "),
    "index": ("step 0", "building index maps in "),
    "evaluation": ("step 2", "reading a batch of ValidationDataset in this process"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Exit code, errors and --save of each run; all at once, since they mostly wait."""
    root = tmp_path_factory.mktemp("hanging")
    make_checkpoint(root)
    make_data(root)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    code, runs = RUN.replace("TIMEOUT", str(TIMEOUT)), {}
    for how in DOING:
        command = [sys.executable, "-c", code, how, root, root / how]
        runs[how] = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    try:
        errors = {how: process.communicate(timeout=300)[1] for how, process in runs.items()}
    finally:
        for process in runs.values():
            process.kill()
    return {how: (process.returncode, errors[how], root / how) for how, process in runs.items()}


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
    assert not list(save.glob("iter_*"))
