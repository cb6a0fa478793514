"""These tests run in the environment of `environment.sh`: `make test-te`."""

import pytest

from tests.emulation import extension
from tests.transformer_engine import ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip where Transformer Engine's Python part is not there, or the real thing is."""
    if extension.is_installed():
        return
    reason = "needs Transformer Engine's Python part and the tests' stand-in: make test-te"
    for item in items:
        if "tests/transformer_engine/" in str(item.path).replace("\\", "/"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="module")
def _end_ranks():
    yield
    ranks.close()
