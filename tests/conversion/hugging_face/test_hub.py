"""A model by its name on the hub: the real client with a local server in place of the hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conversion.helpers import assert_same_tensors, checkpoint_tensors, run
from tests.conversion.tiny_models import save_model
from tests.data.preparation.hub_server import Hub, serve

ROOT = Path(__file__).parents[3]
NAME = "someone/tiny-qwen2"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("dense") / "hf"
    save_model("qwen2", directory)
    return directory


def model_hub(dense: Path) -> Hub:
    """A hub with the model, and files that an import does not need."""
    files = {path.name: path.read_bytes() for path in dense.iterdir()}
    others = ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", "original/consolidated.safetensors")
    return Hub({NAME: {**files, **dict.fromkeys(others, b"x" * 1000)}, "someone/pickles": {"pytorch_model.bin": b"x"}})


def start(endpoint: str, work: Path, *words: object, **settings: str) -> subprocess.CompletedProcess:
    """Run `moe-lpr WORDS` with a cache of its own."""
    hub = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(work / "home")}
    hub |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "HF_TOKEN": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_moe_lpr.cli", *map(str, words)]
    return subprocess.run(
        command, env=os.environ | hub | settings, capture_output=True, text=True, check=False, timeout=200
    )


def test_import_by_name_offline_and_from_the_cache(tmp_path, dense):
    hub = model_hub(dense)
    import_words = ("import", "--hf", NAME, "--num-experts", "2", "--save")
    with serve(hub) as endpoint:
        done = start(endpoint, tmp_path, *import_words, tmp_path / "first")
        assert done.returncode == 0, done.stderr
        assert {path for path, _ in hub.sent} == {path.name for path in dense.iterdir()}
        size = sum(path.stat().st_size for path in dense.iterdir()) / 1e6
        (line,) = [line for line in done.stderr.splitlines() if "downloading" in line]
        assert line.startswith(f"{NAME} at 0123456789ab: downloading {size:.1f} MB to {tmp_path / 'home'}")
        hub.sent.clear()
        again = start(endpoint, tmp_path, *import_words, tmp_path / "second", "--revision", "main")
        assert again.returncode == 0 and hub.sent == [] and "downloading" not in again.stderr
    # Without the server: the client finds the files in its cache.
    for number, offline in enumerate("01"):
        target = tmp_path / f"offline-{number}"
        done = start(endpoint, tmp_path, *import_words, target, HF_HUB_OFFLINE=offline)
        assert done.returncode == 0, done.stderr
    run("import", "--hf", dense, "--save", tmp_path / "directory", "--num-experts", 2)
    expected = checkpoint_tensors(tmp_path / "directory")
    for name in ("first", "second", "offline-0", "offline-1"):
        assert_same_tensors(checkpoint_tensors(tmp_path / name), expected)


@pytest.mark.parametrize(
    ("name", "settings", "change", "message"),
    [
        (NAME, {}, lambda hub: hub.gated.add(NAME), f"{NAME}: accept its conditions at "),
        ("someone/else", {}, lambda hub: None, "someone/else: not on the hub, or it asks for a login"),
        ("someone/pickles", {}, lambda hub: None, "someone/pickles has no safetensors weights on the hub"),
        (NAME, {"HF_HUB_OFFLINE": "1"}, lambda hub: None, f"{NAME}: the hub does not answer: Cannot find"),
        (NAME, {"HF_ENDPOINT": "http://127.0.0.1:9"}, lambda hub: None, f"{NAME}: the hub does not answer"),
    ],
)
def test_failures_are_one_line(tmp_path, dense, name, settings, change, message):
    hub = model_hub(dense)
    change(hub)
    with serve(hub) as endpoint:
        done = start(endpoint, tmp_path, "import", "--hf", name, "--save", tmp_path / "moe", **settings)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and message in errors[0], done.stderr
    assert not (tmp_path / "moe").exists()


def test_a_revision_of_a_directory_is_refused(tmp_path, dense, capsys):
    with pytest.raises(SystemExit):
        run("import", "--hf", dense, "--revision", "main", "--save", tmp_path / "moe")
    assert "is no name on the hub; leave the flag out" in capsys.readouterr().err
