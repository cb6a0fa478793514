"""The slowest files first, so that no worker is left alone with one; the seconds of each at the end.

python -m pytest -p tests.slowest_first --numprocesses 2 --dist loadfile --no-loadscope-reorder
"""

from collections import Counter

import pytest

SLOWEST = (
    "tests/slurm/test_jobs.py",
    "tests/endurance/test_short.py",
    "tests/training/watchdog/test_heartbeat.py",
    "tests/training/test_checkpointing.py",
    "tests/training/configuration/test_stages.py",
    "tests/training/test_frozen_bits.py",
    "tests/launching/test_end_to_end.py",
    "tests/training/test_frozen_paths.py",
    "tests/training/test_leaving_evaluations.py",
    "tests/conversion/test_parity.py",
    "tests/training/test_second_expansion.py",
)
"""Their order is what counts; CONTRIBUTING.md has their seconds."""
SHOWN = 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file, those that are not listed last and as they were."""
    places = {path: place for place, path in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(_file(item.nodeid), len(SLOWEST)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the sums, fixtures included."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[_file(report.nodeid)] += report.duration
    terminalreporter.section(f"seconds of the slowest of {len(seconds)} files, {sum(seconds.values()):.0f} s in all")
    for path, sum_of_file in seconds.most_common(SHOWN):
        terminalreporter.line(f"{sum_of_file:6.0f}  {path}")


def _file(nodeid: str) -> str:
    return nodeid.split("::")[0]
