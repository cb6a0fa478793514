"""Tests of the CUDA platform: `make test-gpu` on a machine with NVIDIA GPUs. Nobody has run them yet."""

from pathlib import Path

import pytest
import torch

from tests.gpu.inputs import gpu_checkpoint
from tests.training.runs import make_data

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them all; skip where no device is visible."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if torch.version.cuda is None or not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device is visible to PyTorch"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A checkpoint whose dimensions fit FP8, and token datasets that a model can learn."""
    root = tmp_path_factory.mktemp("gpu")
    return gpu_checkpoint(root), make_data(root)
