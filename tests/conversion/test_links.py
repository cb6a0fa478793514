"""Symbolic links in what import, export and expand read: none may fetch a file that is not the model's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint
from megatron_moe_lpr.conversion.hugging_face.adapter import open_adapter
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import write_manifest
from tests.conversion.helpers import assert_same_tensors, checkpoint_tensors, run

SECRET = "root:secret:"


@pytest.fixture
def dense(tmp_path: Path, dense_directory: Callable[[str], Path]) -> Path:
    """A Qwen2 directory that the test may spoil."""
    dense = Path(shutil.copytree(dense_directory("qwen2"), tmp_path / "dense"))
    (dense / "LICENSE").write_text("licence")
    (dense / "tokenizer_config.json").write_text("{}")
    return dense


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail and leave nothing; gives its error line."""

    def call(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 1 and sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err.splitlines()[-1]

    return call


def lead_out(path: Path, tmp_path: Path) -> None:
    """Move a file or directory out of the model and leave a link to it; where nothing is, to a secret."""
    outside = tmp_path / f"outside-{path.name}"
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text(SECRET)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(outside)


LINKED = ("LICENSE", "NOTICE.txt", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


@pytest.mark.parametrize("name", [*LINKED, "tokenizer_config.json", "additional_chat_templates/x.jinja", "README.md"])
def test_import_of_a_file_elsewhere(name: str, dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    lead_out(dense / name, tmp_path)
    line = refuse("import", "--hf", dense, "--save", tmp_path / "out")
    assert f"{dense / name}: a symbolic link that leads out of {dense}" in line


def test_import_of_a_directory_elsewhere(dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text(SECRET)
    (dense / "additional_chat_templates").symlink_to(tmp_path / "private")
    line = refuse("import", "--hf", dense, "--save", tmp_path / "out")
    assert "additional_chat_templates: a symbolic link that leads out of" in line


@pytest.mark.parametrize("name", ["index", "shard"])
def test_import_of_weights_elsewhere(name: str, dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    shard, index = dense / "model-00001-of-00001.safetensors", dense / "model.safetensors.index.json"
    (dense / "model.safetensors").rename(shard)
    index.write_text(json.dumps({"weight_map": {"x": shard.name}}))
    lead_out(index if name == "index" else shard, tmp_path)
    assert "leads out of" in refuse("import", "--hf", dense, "--save", tmp_path / "out")


@pytest.mark.parametrize("name", ["moe_lpr/card.json", "moe_lpr/config.json", "moe_lpr"])
def test_import_of_an_export(name: str, dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    run("import", "--hf", dense, "--save", tmp_path / "checkpoint", "--num-experts", 3)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "moe")
    lead_out(tmp_path / "moe" / name, tmp_path)
    assert "leads out of" in refuse("import", "--hf", tmp_path / "moe", "--save", tmp_path / "out")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter(name: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "MOE", "num_experts": 2, "topk": 2}))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    open_adapter(adapter)
    lead_out(adapter / name, tmp_path)
    with pytest.raises(UserError, match=f"{name}: a symbolic link that leads out of"):
        open_adapter(adapter)


def test_a_snapshot_of_the_hubs_cache(dense: Path, tmp_path: Path) -> None:
    """Read through a link, it gives what the plain directory gives; the copies are files of their own."""
    run("import", "--hf", dense, "--save", tmp_path / "plain", "--num-experts", 3)
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(dense.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (blobs / "0").chmod(0o600)
    (tmp_path / "model").symlink_to(snapshot)
    run("import", "--hf", tmp_path / "model", "--save", tmp_path / "cached", "--num-experts", 3)
    assert_same_tensors(checkpoint_tensors(tmp_path / "plain"), checkpoint_tensors(tmp_path / "cached"))
    sides = [resolve_checkpoint(tmp_path / name).side_directory for name in ("plain", "cached")]
    names = [sorted(path.name for path in side.iterdir()) for side in sides]
    assert names[0] == names[1] and "LICENSE" in names[0]
    assert not any(path.is_symlink() for path in sides[1].iterdir())
    first = sorted(path.name for path in snapshot.iterdir())[0]
    assert (sides[1] / first).stat().st_mode & 0o777 == 0o600


def test_checkpoints(dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    """A link among a checkpoint's small files: whoever opens it refuses, whatever its checksums say."""
    run("import", "--hf", dense, "--save", tmp_path / "checkpoint", "--num-experts", 3)
    checkpoint = resolve_checkpoint(tmp_path / "checkpoint")
    lead_out(checkpoint.side_directory / "NOTICE", tmp_path)
    write_manifest(checkpoint.path, {})
    for verified in (True, False):
        with pytest.raises(UserError, match="NOTICE: a symbolic link that leads out of"):
            open_checkpoint(checkpoint.path, verified)
    for words in (("export", "--hf"), ("expand", "--add-experts", 1, "--save")):
        line = refuse(words[0], "--load", tmp_path / "checkpoint", *words[1:], tmp_path / "out", "--no-verify")
        assert "NOTICE: a symbolic link that leads out of" in line


def test_a_checkpoint_reached_through_a_link(dense: Path, tmp_path: Path) -> None:
    run("import", "--hf", dense, "--save", tmp_path / "checkpoint", "--num-experts", 3)
    (tmp_path / "checkpoint" / "release").rename(tmp_path / "moved")
    (tmp_path / "checkpoint" / "release").symlink_to(tmp_path / "moved")
    (tmp_path / "alias").symlink_to("checkpoint")
    run("export", "--load", tmp_path / "alias", "--hf", tmp_path / "moe")
    assert (tmp_path / "moe" / "LICENSE").read_text() == "licence"
