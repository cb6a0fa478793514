"""metrics.jsonl over kills, resumes and a full disk."""

import json
import resource
import subprocess
import sys

import pytest

from megatron_moe_lpr.evaluation.report.inputs import read_training_log
from megatron_moe_lpr.training.logs.metrics_file import MetricsFile


def records(path):
    return [(line["kind"], line["iteration"], line.get("x")) for line in map(json.loads, path.read_text().splitlines())]


def resumed(path, iteration: int, steps: range, start: int) -> MetricsFile:
    """The log of a run that resumes from `iteration` and logs `steps`; the loss of each tells its start."""
    file = MetricsFile(path, iteration)
    for step in steps:
        file.append("train", step, {"consumed_tokens": 8 * step, "lm_loss/el": 10.0 * start + step, "x": start})
    return file


def test_a_log_is_only_appended_to_and_readers_find_each_step_once(tmp_path):
    """After a start, a resume from step 2 that logs less often, and one from step 3 that has logged nothing yet."""
    path = tmp_path / "run" / "metrics.jsonl"
    resumed(path, 0, range(1, 6), 1)
    before = path.read_bytes()
    with path.open("a") as stream:
        stream.write('{"kind": "train", "itera')  # a kill
    resumed(path, 2, range(4, 5), 2)
    assert path.read_bytes().startswith(before)
    MetricsFile(path, 3)
    assert records(path)[5:] == [("resume", 2, None), ("train", 4, 2), ("resume", 3, None)]
    assert read_training_log("Stage 1", path).losses == {"el": [(8, 11.0), (16, 12.0)]}
    resumed(path, 3, range(4, 6), 3)
    assert read_training_log("Stage 1", path).losses == {"el": [(8, 11.0), (16, 12.0), (32, 34.0), (40, 35.0)]}


def test_a_resume_that_repeats_nothing_leaves_no_trace(tmp_path):
    path = tmp_path / "metrics.jsonl"
    resumed(path, 0, range(1, 4), 1)
    resumed(path, 3, range(4, 5), 2)
    assert [kind for kind, _, _ in records(path)] == ["train"] * 4


def test_evaluations_that_count_are_those_since_the_last_resume_before_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    assert file.evaluated == set()
    file.append("valid/el", 2, {"dataset": "a"})
    file.append("valid/el", 4, {"dataset": "a"})
    assert MetricsFile(path, 2).evaluated == {"a"}  # and step 4 will be repeated
    assert MetricsFile(path, 4).evaluated == set()
    MetricsFile(path, 4).append("valid/el", 4, {"dataset": "b"})
    assert MetricsFile(path, 4).evaluated == {"b"}


@pytest.mark.parametrize("tail", [b"\0" * 40, b'{"kind": "train"', "\u20ac".encode()[:2], b"[" * 9000])
def test_what_a_kill_leaves_of_a_line_is_cut_off(tail, tmp_path):
    path = tmp_path / "metrics.jsonl"
    resumed(path, 0, range(1, 3), 1)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    MetricsFile(path, 2)
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_whole_lines(tmp_path):
    """The limit on file sizes stands for the disk: the write that passes it gets through in part."""
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys\nfrom pathlib import Path\nfrom megatron_moe_lpr.errors import run_command\n"
        "from megatron_moe_lpr.training.logs.metrics_file import MetricsFile\n"
        "file = MetricsFile(Path(sys.argv[1]), 0)\n"
        "run_command(lambda: [file.append('train', step, {'x': step}) for step in range(1, 100)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {path}: File too large") and "Traceback" not in done.stderr
    found = records(path)
    assert found and found == [("train", step, step) for step in range(1, len(found) + 1)]
    assert path.read_bytes().endswith(b"\n")
