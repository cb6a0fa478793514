"""What a tool imports before it can tell its flags: counted, not timed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = (
    "allocate_experts",
    "build_index",
    "inspect_data",
    "merge_datasets",
    "plan",
    "preprocess_data",
    "report",
)
HEAVY = ("megatron.core", "torch", "transformers")
CHILD = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(*(name for name in {HEAVY} if name in sys.modules), file=sys.stderr, end="")
"""


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("flag", ["--help", "--no-such-flag"])
def test_flags_are_told_without_heavy_imports(tool, flag):
    command = [sys.executable, "-c", CHILD, str(ROOT / "tools" / f"{tool}.py"), flag]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == (0 if flag == "--help" else 2)
    *said, imported = result.stderr.split("\n")
    assert imported == ""
    assert "usage" in result.stdout if flag == "--help" else "error:" in "".join(said)


def test_bad_flag_of_evaluate_is_one_line():
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), "--no-such-flag"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "--no-such-flag" in result.stderr.splitlines()[-1]
