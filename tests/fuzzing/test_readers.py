"""The same few hostile files for each reader at every run; tests/fuzzing/fuzz_readers.py reads many more."""

import pytest

from tests.fuzzing.running import fuzz
from tests.fuzzing.targets import TARGETS

INPUTS = 60
PROGRAMS = 200
"""Of opcodes: most of them end early."""


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_files_are_refused(name):
    inputs = PROGRAMS if name.endswith("opcodes") else INPUTS
    counts = fuzz(name, inputs, number=20260)
    assert counts["read"] >= inputs // 2 and counts["refused"] > 0
