"""Tests of the CUDA platform: on GPUs by `make test-gpu`, on the emulated device by `make test-te`.

Where Transformer Engine is missing, or with TRANSFORMER_IMPL=local, they run on layers of PyTorch alone; those that
need its kernels are skipped.
"""

from pathlib import Path

import pytest

from tests.gpu import device, ranks
from tests.gpu.inputs import gpu_checkpoint
from tests.gpu.test_numerics import RECIPES
from tests.training.runs import make_data

HERE = Path(__file__).parent
NEED_ENGINE = (
    "test_fused_kernels.py",
    "test_synchronisations.py",
    "test_memory.py",
    "test_weights_in_fp8",
    "test_weights_gathered_in_fp8",
    "test_fused_adam",
    "test_the_commands_of_a_user",
    "[experts.linear_fc1.weight0-True-None]",
)
"""Files, tests and cases that are about Transformer Engine's kernels, beside all cases of an FP8 recipe: calls of its
kernels, waits and memory with them, and its ignoring of a wrong freeze."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them all; skip where there is no device."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not device.is_present():
                item.add_marker(pytest.mark.skip(reason="no CUDA device is visible to PyTorch"))
            elif device.LOCAL and _needs_engine(item):
                item.add_marker(pytest.mark.skip(reason="needs Transformer Engine"))


def _needs_engine(item: pytest.Item) -> bool:
    """Whether a test is about Transformer Engine, or a case of it computes in FP8. That it is refused needs none."""
    if item.path.name == "test_local.py":
        return False
    case = item.nodeid.partition("[")[2]
    return any(name in item.nodeid for name in NEED_ENGINE) or any(name in case for name in ("fp8", *RECIPES))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A checkpoint whose dimensions fit FP8, and token datasets that a model can learn."""
    root = tmp_path_factory.mktemp("gpu")
    return gpu_checkpoint(root), make_data(root)


@pytest.fixture(autouse=True, scope="module")
def _end_ranks():
    yield
    ranks.close()
