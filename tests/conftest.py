"""Shared by all tests: the CPU platform, and the end of the rank pools."""

import gc
import os

# Ranks share the cores: more threads than cores make every small matrix product slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A path that is not there may be a name on the hub: no test asks the real one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from megatron_moe_lpr.parallel.groups import destroy_parallel, initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from tests.distributed import close_pools


def pytest_collection_finish() -> None:
    """What has been imported by now is never garbage, and long to look through."""
    gc.freeze()


@pytest.fixture(scope="session")
def cpu_platform():
    """The CPU platform of this process, alone in its world."""
    platform = select_platform("cpu")
    initialize_parallel(platform, ParallelLayout())
    yield platform
    destroy_parallel()


@pytest.fixture(autouse=True, scope="module")
def _end_pools():
    """With each file, so that what a rank remembers of one does not reach the next."""
    yield
    close_pools()
