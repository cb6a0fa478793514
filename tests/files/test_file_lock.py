"""Directories that one run at a time writes to."""

import os
from pathlib import Path

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.file_lock import directory_lock


def test_one_run_a_directory(tmp_path: Path) -> None:
    with directory_lock(tmp_path / "out", "--output"):
        with (
            pytest.raises(
                UserError, match=rf"--output .*out: another run writes there now \(process {os.getpid()} on "
            ),
            directory_lock(tmp_path / "out", "--output"),
        ):
            pass
        (tmp_path / "out" / "file").write_text("kept")
    with directory_lock(tmp_path / "out", "--output"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
