"""A converted checkpoint: its manifest, and a tokenizer that is not the card's."""

from pathlib import Path

import pytest

from megatron_moe_lpr.checkpoint.integrity import MANIFEST, checksum_of_file, read_manifest, write_manifest
from megatron_moe_lpr.checkpoint.verification import open_checkpoint
from megatron_moe_lpr.errors import UserError
from tests.conversion.helpers import run
from tests.conversion.tiny_models import save_model


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    save_model("qwen2-tied", tmp_path / "hf")
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "checkpoint", "--num-experts", 3)
    return tmp_path / "checkpoint" / "release"


def test_conversion_writes_checksums_of_what_is_there(converted: Path) -> None:
    entries = read_manifest(converted)
    files = {path.relative_to(converted).as_posix() for path in converted.rglob("*") if path.is_file()}
    assert entries.keys() == files - {MANIFEST.as_posix()}
    assert all(checksum_of_file(converted / name) == entry for name, entry in entries.items())
    assert "moe_lpr/tokenizer.json" in entries and "common.pt" in entries


def test_cut_tokenizer_is_not_exported(converted: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = converted / "moe_lpr" / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes()[:-5])
    for _ in ("with its manifest", "without"):
        with pytest.raises(SystemExit):
            run("export", "--load", converted, "--hf", converted.parent / "out")
        assert "tokenizer.json: " in capsys.readouterr().err and not (converted.parent / "out").exists()
        (converted / MANIFEST).unlink(missing_ok=True)
    # Also where somebody summed the cut one.
    write_manifest(converted, {})
    with pytest.raises(UserError, match=r"tokenizer\.json: not the file that the card was written with"):
        open_checkpoint(converted)
    tokenizer.unlink()
    write_manifest(converted, {})
    with pytest.raises(UserError, match=r"tokenizer\.json: missing"):
        open_checkpoint(converted)
