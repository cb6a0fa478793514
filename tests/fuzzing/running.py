"""Give a reader hostile files: it may only raise UserError, must not hang, and its memory must fit the file's size."""

import gc
import signal
import tempfile
import tracemalloc
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings

from megatron_moe_lpr.errors import UserError
from tests.fuzzing.targets import TARGETS, Target

SECONDS = 20
MEMORY_FLOOR = 48 << 20
"""Bytes of Python objects that a reader may build for any file: enough for the largest model within its limits."""
MEMORY_FACTOR = 64


def fuzz(name: str, inputs: int, number: int | None = None) -> dict[str, int]:
    """Read `inputs` hostile files; with a seed, always the same ones.

    Returns:
        How many files were read, and how many of them refused.

    Raises:
        AssertionError, or what the reader raised: hypothesis found an input that does harm, and has minimised it.
    """
    counts = {"read": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as folder:
        target, path = TARGETS[name], TARGETS[name].prepare(Path(folder))
        valid = path.read_bytes()
        target.read(path)

        @settings(
            max_examples=inputs,
            deadline=None,
            database=None,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(target.hostile(valid))
        def check(data: bytes) -> None:
            path.write_bytes(data)
            counts["read"] += 1
            counts["refused"] += _read(target, path, len(data))

        (seed(number)(check) if number is not None else check)()
    return counts


def _read(target: Target, path: Path, size: int) -> bool:
    """Read one file within the limits of time and memory. Returns whether it was refused."""

    def too_long(*_: object) -> None:
        raise AssertionError(f"not done within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    tracemalloc.start()
    try:
        target.read(path)
        return False
    except UserError as error:
        assert str(error)
        return True
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        gc.collect(0)
        assert peak <= MEMORY_FLOOR + MEMORY_FACTOR * size, f"{peak:,} bytes for a file of {size:,}"
