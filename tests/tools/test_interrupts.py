"""Ctrl-C and a full disk while a tool writes end in one line and an exit code, with no partial output."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conversion.helpers import run
from tests.conversion.tiny_models import save_model
from tests.data.builders import CORPUS

ROOT = Path(__file__).parents[2]
INTERRUPTED = """
import os, runpy, signal, sys

target, sys.argv = sys.argv[1], sys.argv[2:]
waiting = [True]

def interrupt(event, arguments):
    # The first file that is opened for writing where the results go: Ctrl-C, as a terminal sends it.
    if event == "open" and waiting and str(arguments[0]).startswith(target) and arguments[2] & os.O_ACCMODE:
        waiting.clear()
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_model("qwen2-tied", root / "hf")
    run("import", "--hf", root / "hf", "--save", root / "checkpoint", "--num-experts", 3)
    return root


def command_line(name: str, models: Path, out: Path) -> list[str]:
    """Return a command line whose output is below `out`."""
    if name == "preprocess":
        source = ["--input", CORPUS / "valid" / "el.jsonl.zst", "--tokenizer", ROOT / "data" / "base_model"]
        words = ["preprocess_data.py", *source, "--language", "el", "--output-prefix", out / "el", "--workers", 1]
    elif name == "import":
        words = ["convert_hf.py", "import", "--hf", models / "hf", "--save", out / "new", "--num-experts", 3]
    else:
        words = ["convert_hf.py", "export", "--load", models / "checkpoint", "--hf", out / "new"]
    return [str(ROOT / "tools" / words[0]), *map(str, words[1:])]


def start(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=200)


@pytest.mark.parametrize("name", ["preprocess", "import", "export"])
def test_ctrl_c(name, models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    done = start(sys.executable, "-c", INTERRUPTED, str(out), *command_line(name, models, out))
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert [path for path in out.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["preprocess", "import"])
def test_killed_and_started_again(name, models, tmp_path):
    """The second run removes the partial output of the killed one and names it."""
    # Not at the lock, which comes first, but at the first file of the output itself.
    program = INTERRUPTED.replace("signal.SIGINT", "signal.SIGKILL").replace("[True]", "[True] * 2")
    program = program.replace("waiting.clear()", "waiting.pop()").replace("os.kill(", "waiting or os.kill(")
    words = command_line(name, models, tmp_path)
    assert start(sys.executable, "-c", program, str(tmp_path), *words).returncode == -9
    (left,) = tmp_path.glob(".*.partial*")
    done = start(sys.executable, *words)
    assert done.returncode == 0, done.stderr
    assert f"note: {left}: left by a run that was killed; removed" in done.stderr
    assert not list(tmp_path.glob(".*")) and len(list(tmp_path.iterdir())) == (3 if name == "preprocess" else 1)


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("name", ["import", "export"])
def test_a_volume_as_output(name, models, tmp_path, capsys):
    """The output path is a mount point, as with `docker run -v`; nothing is written to its parent's disk."""
    with small_disk(tmp_path / "new", "20m") as out:
        (out / "lost+found").mkdir()
        words = command_line(name, models, tmp_path)[1:]
        run(*words)
        last = {"import": "latest_checkpointed_iteration.txt", "export": "config.json"}[name]
        assert f"{out}: is a mount point; it will be filled in place, {last} last" in capsys.readouterr().err
        assert (out / last).is_file() and not list(out.glob(".*")) and list(tmp_path.iterdir()) == [out]
        with pytest.raises(SystemExit):
            run(*words)
        assert "exists and is not empty" in capsys.readouterr().err
        run(*words, "--overwrite")
        assert (out / last).is_file() and not list(out.glob(".*")) and (out / "lost+found").is_dir()
    with small_disk(tmp_path / "new", "40k") as out:
        with pytest.raises(SystemExit):
            run(*words)
        assert f"{out}: no space left on device" in capsys.readouterr().err and not list(out.iterdir())


@pytest.mark.parametrize("name", ["preprocess", "import", "export"])
def test_full_disk(name, models, tmp_path):
    with small_disk(tmp_path / "disk", "40k") as out:
        done = start(sys.executable, *command_line(name, models, out))
        assert done.returncode == 1, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: ") and str(out) in last and "space" in last.lower(), done.stderr
        assert "Traceback" not in done.stderr
        assert [path for path in out.rglob("*") if path.is_file()] == []
