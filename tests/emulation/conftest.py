"""Tests of the emulation itself: `make test-te TESTS=tests/emulation`."""

import pytest
import torch

from tests.emulation import extension


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip where Transformer Engine's Python part is not there, or the real thing is."""
    if extension.is_installed():
        return
    for item in items:
        if "tests/emulation/" in str(item.path).replace("\\", "/"):
            item.add_marker(pytest.mark.skip(reason="needs Transformer Engine's Python part: make test-te"))


@pytest.fixture
def tex():
    """The emulated extension as Transformer Engine's Python part calls it."""
    import transformer_engine_torch

    return transformer_engine_torch


@pytest.fixture(autouse=True)
def _on_this_machine(monkeypatch):
    """Quantised tensors ask which device they lie on; the same random numbers in every test."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    torch.manual_seed(0)
