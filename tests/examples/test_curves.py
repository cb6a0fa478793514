"""The curves of `make paper-scaling`: fractions of the replay from the datasets' manifests, and missing files."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "demo" / "curves.py"


def dataset(directory: Path, name: str, tokens: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps({"tokens": tokens}))


def curves(tmp_path: Path, *replays: int) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--table", tmp_path / "paper", "--full", tmp_path / "full", "--seed", "1234"]
    command += ["--output", tmp_path / "curves.json", "--replays", *replays]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def test_the_replay_s_share_is_that_of_the_tokens(tmp_path: Path) -> None:
    for language in ("el", "hu", "tr"):
        dataset(tmp_path / "full" / "data", f"train-{language}", 100_000)
    for language in ("en", "zh"):
        dataset(tmp_path / "paper" / "data", f"replay-1-{language}", 150)
        dataset(tmp_path / "paper" / "data", f"replay-11-{language}", 1_860)
    run = curves(tmp_path, 1, 11)
    assert run.returncode == 0, run.stderr
    replay = json.loads((tmp_path / "curves.json").read_text())[1]
    assert [point["value"] for point in replay["points"]] == ["0.1%", "1.2%"]
    assert [Path(point["evaluations"][0]).name for point in replay["points"]] == ["replay-1.json", "replay-11.json"]
    assert "1 or 11 of each language" in replay["caption"]


def test_a_replay_without_datasets_is_named(tmp_path: Path) -> None:
    run = curves(tmp_path, 3)
    assert run.returncode != 0
    assert run.stderr.startswith("error:") and "replay-3-*.json" in run.stderr
    assert not (tmp_path / "curves.json").exists()
