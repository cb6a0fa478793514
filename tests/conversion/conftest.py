"""Fixtures: each tiny model is built and saved once."""

from collections.abc import Callable
from pathlib import Path

import pytest

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
