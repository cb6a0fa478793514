"""Logs that fail or hang cost a warning, and each step is in them once, whatever the clock says."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from megatron_moe_lpr.training.configuration.config import LoggingOptions
from megatron_moe_lpr.training.logs import event_file, log_sinks, metrics
from megatron_moe_lpr.training.logs.log_sinks import LastingSink, Record, ThreadedSink
from megatron_moe_lpr.training.logs.metrics import MetricsWriter

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: steps and values of each curve."""
    found = event_accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


SETTINGS = {"seed": 7, "data_path": ["1", "a|b"], "split": None}


def texts(directory: Path) -> dict[str, list[tuple[int, str]]]:
    """What TensorBoard shows on its page of texts."""
    from tensorboard.backend.event_processing import plugin_event_accumulator

    found = plugin_event_accumulator.EventAccumulator(str(directory), tensor_size_guidance={"text": 0})
    found.Reload()
    tags = found.PluginTagToContent("text")
    return {tag: [(one.step, one.tensor_proto.string_val[0].decode()) for one in found.Tensors(tag)] for tag in tags}


def start(save: Path, iteration: int = 0, settings: dict = SETTINGS, **options) -> MetricsWriter:
    """On rank 0 of a world that needs no process groups."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(metrics.dist, "get_rank", lambda: 0)
        return MetricsWriter(LoggingOptions(**options), save, "stage 1", iteration, settings)


def log(writer: MetricsWriter, steps, offset: float = 0.0) -> None:
    for step in steps:
        writer.write("train", step, {"lm_loss": step + offset, "note": "no number"})
        writer.write("valid/el/news", step, {"lm_loss": -step - offset, "dataset": "news"})


@pytest.mark.parametrize("clock", [1_000_000, 0, -1_000_000])
def test_tensorboard_has_each_step_once_after_resumes(clock, tmp_path, monkeypatch):
    """With a clock that goes on, stands still and was set back by days between the starts, as after a repair."""
    began = time.time()
    for number, (iteration, steps) in enumerate(
        [(0, range(1, 6)), (3, range(4, 8)), (7, range(8, 9)), (2, range(3, 5))]
    ):
        monkeypatch.setattr(event_file.time, "time", lambda number=number: began + number * clock)
        writer = start(tmp_path, iteration, tensorboard_dir=tmp_path / "tb")
        log(writer, steps, offset=number / 10)
        writer.close()
    expected = [(1, 1.0), (2, 2.0), (3, 3.3), (4, 4.3)]
    found = curves(tmp_path / "tb")
    assert set(found) == {"train/lm_loss", "valid/el/news/lm_loss"}
    assert found["train/lm_loss"] == [(step, pytest.approx(value)) for step, value in expected]
    assert found["valid/el/news/lm_loss"] == [(step, pytest.approx(-value)) for step, value in expected]


def test_tensorboard_has_the_settings_of_every_start_once_as_a_text(tmp_path):
    for iteration, seed in [(0, 7), (3, 8), (3, 9)]:
        writer = start(tmp_path, iteration, {**SETTINGS, "seed": seed}, tensorboard_dir=tmp_path / "tb")
        log(writer, range(iteration + 1, iteration + 4))
        writer.close()
    table = "| setting | value |\n|---|---|\n| seed | {} |\n| data_path | 1 a\\|b |\n| split | None |"
    assert texts(tmp_path / "tb") == {"config": [(1, table.format(7)), (4, table.format(9))]}
    assert [step for step, _ in curves(tmp_path / "tb")["train/lm_loss"]] == list(range(1, 7))


def test_files_of_a_summary_writer_are_gone_on_from(tmp_path):
    """A directory in which an older version has written."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "tb")) as older:
        for step in range(1, 6):
            older.add_scalar("train/lm_loss", step, step)
    writer = start(tmp_path, 3, tensorboard_dir=tmp_path / "tb")
    log(writer, range(4, 5), offset=0.5)
    writer.close()
    assert curves(tmp_path / "tb")["train/lm_loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5)]


FAILURES = [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO]


@pytest.mark.parametrize("number", FAILURES)
def test_a_place_that_fails_is_told_once_and_has_everything_in_the_end(number, tmp_path, monkeypatch, capfd):
    writer = start(tmp_path, tensorboard_dir=tmp_path / "tb")
    log(writer, range(1, 3))
    writer.flush()
    original = open
    with monkeypatch.context() as patched:

        def fail(path, mode="r", **options):
            if "a" in mode:
                raise OSError(number, os.strerror(number))
            return original(path, mode, **options)

        patched.setattr("builtins.open", fail)
        log(writer, range(3, 6))
        writer.flush()
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2  # one of each place
    for path in (tmp_path / "metrics.jsonl", tmp_path / "tb"):
        assert any(str(path) in line and os.strerror(number) in line for line in warnings)
    log(writer, range(6, 7))
    writer.close()
    assert [step for step, _ in curves(tmp_path / "tb")["train/lm_loss"]] == list(range(1, 7))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [one["iteration"] for one in records if one["kind"] == "train"] == list(range(1, 7))


def test_a_directory_that_cannot_be_made_is_named(tmp_path, capfd):
    (tmp_path / "file").touch()
    writer = start(tmp_path, tensorboard_dir=tmp_path / "file" / "tb")
    log(writer, range(1, 3))
    writer.close()
    text = capfd.readouterr().err
    assert f"warning: --tensorboard-dir {tmp_path / 'file' / 'tb'}: " in text and "were not written" in text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


class Stubborn:
    """A place that fails a few times, then takes all."""

    def __init__(self, failures: int) -> None:
        self.failures, self.records = failures, []

    def write(self, record: Record) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("no network")
        self.records.append(record.iteration)

    def close(self) -> None: ...


def test_records_wait_and_are_tried_again(monkeypatch, capfd):
    monkeypatch.setattr(log_sinks, "RETRY_SECONDS", 0.0)
    place = Stubborn(3)
    sink = LastingSink("the place", lambda: place)
    for step in range(1, 6):
        sink.write(Record("train", step, {}))
    assert place.records == [1, 2, 3, 4, 5]
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2 and "no network" in told[0] and "works again" in told[1]


class Hanging:
    """A place that never answers."""

    def __init__(self) -> None:
        self.answers = threading.Event()

    def write(self, record: Record) -> None:
        self.answers.wait(100)

    def close(self) -> None: ...


def test_a_place_that_hangs_makes_nobody_wait(monkeypatch, capfd):
    monkeypatch.setattr(log_sinks, "FLUSH_SECONDS", 0.2)
    monkeypatch.setattr(log_sinks, "CLOSE_SECONDS", 0.2)
    place = Hanging()
    sink = ThreadedSink("--tensorboard-dir /slow", lambda: place)
    for step in range(3):
        sink.write(Record("train", step, {}))
        sink.flush()
    sink.close()
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("warning: --tensorboard-dir /slow: does not answer")
    place.answers.set()


def test_without_a_thread_the_process_writes_itself(monkeypatch, capfd):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    place = Stubborn(0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        sink = ThreadedSink("the place", lambda: place)
    sink.write(Record("train", 1, {}))
    sink.flush()
    sink.close()
    assert place.records == [1]
    assert "can't start new thread" in capfd.readouterr().err


class Project(types.ModuleType):
    """Stands for the module wandb."""

    def __init__(self, failing: bool = False) -> None:
        super().__init__("wandb")
        self.failing, self.starts, self.logged = failing, [], []

    def init(self, **options):
        self.starts.append(options)
        return self

    def log(self, values, step):
        if self.failing:
            raise ConnectionError("no route to host")
        self.logged.append((step, values))

    def finish(self): ...


def test_every_start_is_one_run_of_weights_and_biases(tmp_path, monkeypatch):
    project = Project()
    monkeypatch.setitem(sys.modules, "wandb", project)
    for iteration in (0, 2):
        writer = start(tmp_path, iteration, wandb_project="experts")
        log(writer, range(iteration + 1, iteration + 3))
        writer.close()
    first, second = project.starts
    assert first == second
    assert first["project"] == "experts" and first["resume"] == "allow" and first["config"] == SETTINGS
    assert first["allow_val_change"]
    assert (tmp_path / "wandb_run_id").read_text().strip() == first["id"] and first["id"]
    assert [step for step, values in project.logged if "train/lm_loss" in values] == [1, 2, 3, 4]
    assert start(tmp_path / "other", wandb_project="experts").close() is None
    assert project.starts[2]["id"] != first["id"]


@pytest.mark.parametrize("module", [Project(failing=True), None])
def test_weights_and_biases_that_fails_or_is_not_there_costs_a_warning(module, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", module)
    writer = start(tmp_path, wandb_project="experts")
    log(writer, range(1, 4))
    writer.close()
    text = capfd.readouterr().err
    assert "warning: --wandb-project experts: " in text
    assert text.count("the run goes on") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


SPEAKS = """
import sys
from megatron_moe_lpr.lasting_output import outlast_readers
outlast_readers()
for number in range(20000):
    print("line", number, flush=True)
print("reached the end", file=sys.stderr)
"""


@pytest.mark.parametrize("target", ["| head -n 1", "> /dev/full", ">&-"])
def test_a_process_outlives_its_reader(target):
    """As `torchrun ... | head`, a log file on a full disk, and no standard output at all."""
    command = f"set -o pipefail; {sys.executable} -c '{SPEAKS}' {target}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "reached the end" in done.stderr and "Exception ignored" not in done.stderr
    assert done.stderr.count("warning: standard output: ") == (0 if target == ">&-" else 1)
