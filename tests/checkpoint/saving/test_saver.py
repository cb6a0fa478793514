"""Background saves: changes by training meanwhile, a second save, writers that are killed or run out of space."""

import contextlib
import functools
import os
import resource
import signal
import threading
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import (
    AsyncCallsQueue,
    AsyncRequest,
    TemporalAsyncCaller,
    _ActiveAsyncRequest,
)

from megatron_moe_lpr.checkpoint.format.reader import CheckpointReader
from megatron_moe_lpr.checkpoint.saving.saver import CallsQueue, CheckpointSaver, remove_partial
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksum_file import read_checksums, verify
from tests.distributed import rank_pool

RANKS = 2
ROWS = 1000


def sharded(values: torch.Tensor, shared: torch.Tensor) -> dict:
    """Rows of `values` by rank, `shared` a copy on every rank."""
    rank = dist.get_rank()
    return {
        "decoder.rows": ShardedTensor.from_rank_offsets("decoder.rows", values, (0, rank, RANKS), replica_id=0),
        "decoder.copies": ShardedTensor.from_rank_offsets("decoder.copies", shared, replica_id=(0, 0, rank)),
        "counters": {"iteration": 1},
    }


class Scene:
    """A saver with something to save, on every rank."""

    def __init__(self, root, asynchronous: bool = True) -> None:
        self.saver = CheckpointSaver(root, asynchronous)
        self.values = torch.full((ROWS, 8), float(dist.get_rank()))
        self.shared = torch.arange(4096.0)

    def start(self, iteration: int):
        side_files = lambda directory: (directory / "moe_lpr").mkdir(exist_ok=True)  # noqa: E731
        return self.saver.start(iteration, sharded(self.values, self.shared), {}, side_files)

    def hold_writer(self) -> psutil.Process:
        """Suspend rank 0's writer until it is resumed."""
        process = psutil.Process(self.saver.background.process.pid)
        if dist.get_rank() == 0:
            process.suspend()
        dist.barrier()
        return process


@contextlib.contextmanager
def scene(root, asynchronous: bool = True):
    made = Scene(root, asynchronous)
    try:
        yield made
    finally:
        made.saver.close()


def expect(path, add: float = 0.0) -> None:
    reader = CheckpointReader(path)
    expected = torch.arange(float(RANKS)).repeat_interleave(ROWS)[:, None].expand(-1, 8) + add
    assert torch.equal(reader.read("decoder.rows"), expected)
    assert torch.equal(reader.read("decoder.copies"), torch.arange(4096.0) + add)


def save_once(root, asynchronous: bool) -> dict:
    with scene(root, asynchronous) as made:
        saved = made.start(7)
        assert (saved is None) == asynchronous
        saved = saved or made.saver.wait()
        return {"path": saved.path, "stalled": saved.stalled, "seconds": saved.seconds}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_file_has_its_checksum(asynchronous, tmp_path):
    """Each rank writes files of its own, and tensors that both hold are written by one of them."""
    found = rank_pool(RANKS).run(functools.partial(save_once, asynchronous=asynchronous), tmp_path)
    path = found[0]["path"]
    assert path == tmp_path / "iter_0000007"
    expect(path)
    checksums = read_checksums(path)
    on_disk = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert set(checksums) == on_disk - {"moe_lpr/checksums.json"}
    assert {"common.pt", ".metadata", "metadata.json"} <= checksums.keys()
    assert {name[:4] for name in checksums if name.endswith(".distcp")} == {"__0_", "__1_"}
    assert verify(path)
    assert all(0 <= result["stalled"] <= result["seconds"] for result in found)


def change_meanwhile(root) -> None:
    with scene(root) as made:
        process = made.hold_writer()
        made.start(1)
        made.values += 100
        made.shared += 100
        assert made.saver.poll() is None
        dist.barrier()
        if dist.get_rank() == 0:
            assert not (root / "iter_0000001").exists()
            process.resume()
        assert made.saver.wait().iteration == 1


def test_training_goes_on_while_the_checkpoint_stays_what_it_was(tmp_path):
    rank_pool(RANKS).run(change_meanwhile, tmp_path)
    expect(tmp_path / "iter_0000001")


def save_without_threads(root) -> None:
    original = threading.Thread.start

    def fail(thread) -> None:
        raise RuntimeError("can't start new thread")

    with scene(root) as made:
        threading.Thread.start = fail
        try:
            made.saver.expect(sharded(made.values, made.shared), {})
        finally:
            threading.Thread.start = original
        assert made.saver.background.memory.size > 0
        made.start(1)
        assert made.saver.wait().iteration == 1
        # A rank that waits can see how much the process has written.
        assert made.saver.background.progress.read() >= made.values.nbytes


def test_without_a_thread_memory_is_taken_at_once(tmp_path):
    """`cannot join thread before it is started` had hidden the reason."""
    rank_pool(RANKS).run(save_without_threads, tmp_path)
    expect(tmp_path / "iter_0000001")


def save_as_expected(root) -> tuple[int, int]:
    """Reserved bytes before the first save and after it."""
    with scene(root) as made:
        made.saver.expect(sharded(made.values, made.shared), {})
        made.saver.background._wait_for_memory()
        before = made.saver.background.memory.size
        made.values += 1
        made.shared += 1
        made.start(1)
        made.saver.wait()
        return before, made.saver.background.memory.size


def test_the_first_save_finds_its_memory(tmp_path):
    for before, after in rank_pool(RANKS).run(save_as_expected, tmp_path):
        assert before == after > ROWS * 8 * 4
    expect(tmp_path / "iter_0000001", add=1)
    assert verify(tmp_path / "iter_0000001")


def save_twice(root) -> bool:
    with scene(root) as made:
        process = made.hold_writer()
        made.start(1)
        made.values += 1
        made.shared += 1
        before = time.monotonic()
        dist.barrier()  # no rank takes its time later than the timer starts
        if dist.get_rank() == 0:
            threading.Timer(1.0, process.resume).start()
        made.start(2)
        waited = time.monotonic() - before
        first_is_there = (root / "iter_0000001").exists()
        made.saver.wait()
        return waited > 0.9 and first_is_there


def test_a_second_save_waits_for_the_first(tmp_path):
    assert rank_pool(RANKS).run(save_twice, tmp_path) == [True] * RANKS
    expect(tmp_path / "iter_0000001")
    expect(tmp_path / "iter_0000002", add=1)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


def save_while(root, harm) -> str:
    """A complete save, then one during which `harm` is done to rank 0's writer."""
    with scene(root) as made:
        made.start(1)
        made.saver.wait()
        process = made.hold_writer()
        try:
            made.start(2)
            if dist.get_rank() == 0:
                harm(process)
            made.saver.wait()
        except UserError as error:
            return str(error)
        return "no error"


def kill(process: psutil.Process) -> None:
    process.kill()


def fill_disk(process: psutil.Process) -> None:
    process.rlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    process.resume()


@pytest.mark.parametrize("harm, words", [(kill, "its writer process"), (fill_disk, "File too large")])
def test_a_writer_that_fails_leaves_the_former_checkpoint(harm, words, tmp_path):
    """Every rank raises the reason; nothing of the new checkpoint is left."""
    messages = rank_pool(RANKS).run(save_while, tmp_path, harm)
    for message in messages:
        assert message.startswith(f"--save {tmp_path}: checkpoint of step 2 was not written: ") and words in message
        assert "\n" not in message
    assert {path.name for path in tmp_path.iterdir()} == {"iter_0000001", "latest_checkpointed_iteration.txt"}
    expect(tmp_path / "iter_0000001")
    assert verify(tmp_path / "iter_0000001")


def save_with_a_failing_completion(root, error: Exception) -> str:
    """What this rank raises where rank 0 cannot write the files beside the tensors."""
    with scene(root, asynchronous=False) as made:
        made.start(1)

        def fail(directory) -> None:
            raise error

        try:
            made.saver.start(2, sharded(made.values, made.shared), {}, fail)
        except Exception as raised:
            return f"{type(raised).__name__}: {raised}"
        return "no error"


@pytest.mark.parametrize(
    "error, first, others",
    [
        (OSError(28, "No space left on device"), "UserError", "No space left on device"),
        (RuntimeError("a defect"), "RuntimeError: a defect", "RuntimeError: a defect"),
    ],
)
def test_a_failure_of_rank_0_at_the_end_is_raised_on_every_rank(error, first, others, tmp_path):
    """Of a defect too: the other ranks would wait for rank 0 for ever."""
    found = rank_pool(RANKS).run(save_with_a_failing_completion, tmp_path, error)
    assert found[0].startswith(first)
    for message in found[1:]:
        assert message.startswith(f"UserError: --save {tmp_path}: checkpoint of step 2 was not written: ")
        assert "rank 0 on " in message and others in message
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"


def signal_the_writers(process: psutil.Process) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    process.resume()


def test_signals_to_a_writer_do_not_end_it(tmp_path):
    assert rank_pool(RANKS).run(save_while, tmp_path, signal_the_writers) == ["no error"] * RANKS
    expect(tmp_path / "iter_0000002")


def writer_after_close(root) -> tuple[bool, bool]:
    made = Scene(root)
    process = psutil.Process(made.saver.background.process.pid)
    made.hold_writer()
    made.start(1)
    own_group = os.getpgid(process.pid) != os.getpgid(0)
    made.saver.close()
    dist.barrier()
    return own_group, process.is_running()


def test_a_save_given_up_leaves_nothing(tmp_path):
    assert rank_pool(RANKS).run(writer_after_close, tmp_path) == [(True, False)] * RANKS
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / ".iter_0000003.partial").mkdir()
    (tmp_path / ".iter_0000003.partial" / "__0_0.distcp").touch()
    (tmp_path / "iter_0000002").mkdir()
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000002"]


def test_a_writer_of_megatron_s_own_is_noticed(monkeypatch):
    """A version that asks for its caller by another name would start one of its own, which no save here waits for."""

    def renamed_method(queue: AsyncCallsQueue, request: AsyncRequest) -> int:
        queue.async_calls.append(_ActiveAsyncRequest(0, TemporalAsyncCaller(), request))
        return 0

    monkeypatch.setattr(AsyncCallsQueue, "schedule_async_request", renamed_method)
    with pytest.raises(RuntimeError, match="megatron-core has given the save to a writer of its own"):
        CallsQueue(None).schedule_async_request(AsyncRequest(None, (), []))


def test_without_a_background_writer_nothing_is_asynchronous():
    with pytest.raises(ValueError, match="no asynchronous saves"):
        CallsQueue(None).schedule_async_request(AsyncRequest(None, (), []))
