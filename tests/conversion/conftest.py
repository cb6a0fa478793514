"""Fixtures: tiny models, each built and saved once, and commands that must fail."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conversion.helpers import run
from tests.conversion.tiny_models import save_model


@pytest.fixture(scope="session")
def dense_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a model's name to its saved directory, which tests must not change."""
    saved: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in saved:
            saved[name] = save_model(name, tmp_path_factory.mktemp("dense") / name)
        return saved[name]

    return get


@pytest.fixture
def dense(tmp_path: Path, dense_directory: Callable[[str], Path]) -> Path:
    """A Qwen2 directory that the test may spoil."""
    return Path(shutil.copytree(dense_directory("qwen2"), tmp_path / "dense"))


@pytest.fixture
def refuse(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail and leave nothing behind; returns its one error line."""

    def call(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code in (1, 2)  # 2: a flag that is refused before anything is imported
        (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return line

    return call
