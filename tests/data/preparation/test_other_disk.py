"""A language's directory that is a link to another disk."""

import errno
import os
from pathlib import Path

import pytest

from megatron_moe_lpr.data.preparation import hub
from megatron_moe_lpr.data.preparation.hub import CorpusFile, download


def test_a_downloaded_file_crosses_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged, output = tmp_path / "staged", tmp_path / "out"
    staged.write_bytes(b"text")
    (tmp_path / "disk").mkdir()
    (output / "train").mkdir(parents=True)
    (output / "train" / "el").symlink_to(tmp_path / "disk")
    replace = os.replace

    def across(source: Path, target: Path) -> None:
        if Path(source).parent != (tmp_path / "disk"):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        replace(source, target)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(staged))
    monkeypatch.setattr(hub.os, "replace", across)
    file = CorpusFile("org/name", "0123", "a.jsonl", 4, None, output / "train" / "el" / "a.jsonl")
    download(file, output)
    assert file.is_complete and not staged.exists()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["a.jsonl"]
