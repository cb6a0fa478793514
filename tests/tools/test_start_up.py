"""Modules that a tool imports before --help and wrong flags: listed, not timed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUB_COMMANDS = (["import"], ["expand"], ["export"], ["verify"], ["inspect", "none"])
PRETRAIN = "megatron_moe_lpr.pretrain"
LAUNCHED = ("megatron_moe_lpr.launch", "--nproc-per-node", "2", "-m", PRETRAIN)
COMMANDS = {
    **{path.stem: (str(path),) for path in sorted((ROOT / "tools").glob("*.py"))},
    **{f"convert_hf {words[0]}": (str(ROOT / "tools" / "convert_hf.py"), *words) for words in SUB_COMMANDS},
    "pretrain": (PRETRAIN,),
    "launch": LAUNCHED,
}
HEAVY = ("megatron.core", "torch", "transformers")
CHILD = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
    run(sys.argv[0], run_name="__main__")
finally:
    print(*(name for name in {HEAVY} if name in sys.modules), file=sys.stderr, end="")
"""


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "--no-such-flag"])
def test_flags_are_told_without_heavy_imports(command, flag):
    command = [sys.executable, "-c", CHILD, *command, flag]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == (0 if flag == "--help" else 2)
    *said, imported = result.stderr.split("\n")
    assert imported == ""
    if flag == "--help":
        assert "usage" in result.stdout and said == []
    else:
        assert len(said) == 1 and said[0].startswith("error: ") and flag in said[0]


@pytest.mark.parametrize(
    "words", [("inspect", "data/base_model"), ("import", "--hf", "data/base_model", "--num-experts", "2", "--save")]
)
def test_what_converts_works_without_megatron(words, tmp_path):
    """Importing Megatron takes two seconds, as long as writing a model of 1B parameters."""
    words = [*words, str(tmp_path / "checkpoint")] if words[-1] == "--save" else words
    command = [sys.executable, "-c", CHILD, str(ROOT / "tools" / "convert_hf.py"), *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    imported = result.stderr.split("\n")[-1].split()
    assert "torch" in imported and "megatron.core" not in imported
