"""Loader processes that can't start, are killed, have no shared memory or hang."""

import errno
import mmap
import os
import signal
import subprocess
import sys
import tempfile

import pytest
import torch

from megatron_moe_lpr.data.reading.batches import BATCH_KEYS, build_data_iterator
from megatron_moe_lpr.data.reading.loading import explain_failure
from tests.data.builders import NO_CUDA_LINE

ALL = [[2 * index, 2 * index + 1] for index in range(50)]


class Numbers(torch.utils.data.Dataset):
    """Sample i is made of the number i; in a loader process `harm` happens before some of them are read."""

    def __init__(self, harm=None, everywhere=False) -> None:
        self.harm, self.everywhere = harm, everywhere

    def __len__(self):
        return 100

    def __getitem__(self, index):
        if self.harm and index in (41, 60) and (self.everywhere or torch.utils.data.get_worker_info()):
            self.harm()
        return {key: torch.full((3,), index) for key in BATCH_KEYS}


def read(dataset, workers: int = 2) -> list[list[int]]:
    iterator = build_data_iterator(dataset, 0, 2, 0, 1, num_workers=workers)
    return [batch["tokens"][:, 0].tolist() for batch in iterator]


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def read_beyond_a_file() -> None:
    """What reading a mapped file does that was cut, or writing to shared memory that is full."""
    with tempfile.TemporaryFile() as file:
        file.truncate(1 << 16)
        mapped = mmap.mmap(file.fileno(), 0)
        file.truncate(0)
        mapped[1 << 15]


def fail_to_share() -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda: kill(signal.SIGKILL), "was killed, perhaps for lack of memory: pass a smaller --num-workers"),
        (read_beyond_a_file, "a bus error"),
        (fail_to_share, "--shm-size"),
        (lambda: os._exit(3), "ended with exit code 3"),
    ],
)
def test_what_loader_processes_fail_at_is_read_here(harm, words, capfd):
    """Every batch once and in order, and one warning."""
    assert read(Numbers(harm)) == ALL
    # torch's handler of a bus error writes before it, and ends its line with a null character.
    text = capfd.readouterr().err
    assert text.count("warning: ") == 1
    assert "batches are read in the training process from now on" in text and words in text.partition("warning: ")[2]


def test_a_full_shared_memory_is_an_error_in_the_loader_process(monkeypatch, capfd):
    """torch shared batches on their way out, where an error was dropped, and the rank waited for ever."""
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda tensor: fail_to_share())
    assert read(Numbers()) == ALL
    assert "--shm-size" in capfd.readouterr().err


def test_an_error_of_the_data_is_raised_as_it_is(capfd):
    def harm():
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/el.bin")

    with pytest.raises(OSError, match="Input/output error") as caught:
        read(Numbers(harm, everywhere=True))
    assert caught.value.filename == "/data/el.bin"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), BlockingIOError(errno.EAGAIN, "again")]
)
def test_processes_that_cannot_start_are_done_without(error, monkeypatch, capfd):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("multiprocessing.context.ForkContext.Queue", fail)
        patched.setattr("multiprocessing.queues.Queue.__init__", fail)
        iterator = build_data_iterator(Numbers(), 0, 2, 0, 1, num_workers=2)
    assert [batch["tokens"][:, 0].tolist() for batch in iterator] == ALL
    remedy = "--shm-size" if error.errno == errno.ENOSPC else "ulimit -u"
    text = capfd.readouterr().err
    assert remedy in text and "--num-workers 0" in text and "Exception ignored" not in text


def test_a_thread_that_cannot_start_is_a_limit():
    assert "ulimit -u" in explain_failure(RuntimeError("can't start new thread"), [])


HANGS = """
import time
from tests.data.reading.test_loading import Numbers, build_data_iterator
from megatron_moe_lpr.training.watchdog.heartbeat import Heartbeat

def wait_for_a_disk():
    time.sleep(300)

with Heartbeat(timeout=4.0):
    for batch in build_data_iterator(Numbers(wait_for_a_disk), 0, 2, 0, 1, num_workers=2):
        pass
"""


def test_a_loader_process_that_hangs_ends_the_rank_with_both_stacks():
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", HANGS], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1
    line = next(line for line in done.stderr.splitlines() if NO_CUDA_LINE not in line)
    assert line.startswith("error: step 0: rank 0 hangs reading a batch of Numbers in its 2 loader processes")
    assert "_try_get_data" in done.stderr and "in wait_for_a_disk" in done.stderr
