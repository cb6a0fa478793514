"""Tests of the CUDA platform: on GPUs by `make test-gpu`, on the emulated device by `make test-te`."""

from pathlib import Path

import pytest

from tests.gpu import device, ranks
from tests.gpu.inputs import gpu_checkpoint
from tests.training.runs import make_data

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them all; skip where there is no device."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not device.is_present():
                item.add_marker(pytest.mark.skip(reason="no CUDA device is visible to PyTorch"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A checkpoint whose dimensions fit FP8, and token datasets that a model can learn."""
    root = tmp_path_factory.mktemp("gpu")
    return gpu_checkpoint(root), make_data(root)


@pytest.fixture(autouse=True, scope="module")
def _end_ranks():
    yield
    ranks.close()
