"""The same few hostile files for each reader at every run; benchmarks/fuzz_readers.py reads many more."""

import pytest

from tests.fuzzing.running import fuzz
from tests.fuzzing.targets import TARGETS

INPUTS = 60


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_files_are_refused(name):
    counts = fuzz(name, INPUTS, number=20260)
    assert counts["read"] >= INPUTS // 2 and counts["refused"] > 0
