"""metrics.jsonl over kills, resumes and a full disk."""

import json
import resource
import subprocess
import sys

from megatron_moe_lpr.training.logs.metrics_file import MetricsFile


def records(path):
    return [(line["kind"], line["iteration"], line.get("x")) for line in map(json.loads, path.read_text().splitlines())]


def test_each_step_is_there_once_after_a_resume(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3):
        first.append("train", step, {"x": step})
    with path.open("a") as stream:
        stream.write('{"kind": "train", "itera')
    second = MetricsFile(path, 2)
    second.append("train", 3, {"x": 30})
    assert records(path) == [("train", 1, 1), ("train", 2, 2), ("train", 3, 30)]


def test_a_repeated_last_evaluation_replaces_the_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).append("valid/el", 2, {"dataset": "a", "x": 1})
    again = MetricsFile(path, 2)
    again.append("valid/el", 2, {"dataset": "a", "x": 2})
    again.append("valid/el", 2, {"dataset": "b", "x": 3})
    assert records(path) == [("valid/el", 2, 2), ("valid/el", 2, 3)]


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
