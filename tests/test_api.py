"""The Python API: the code of docs/python.md runs as it is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_moe_lpr

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python.md"


def blocks() -> list[str]:
    """Return the code blocks of the page, in order."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def python(program: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_the_page_runs(tmp_path):
    assert len(blocks()) >= 6
    done = python("import sys\nruns = sys.argv[1]\n" + "\n".join(blocks()), str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith(f"{tmp_path}/runs/el ") for line in lines)
    assert float(next(line.split()[1] for line in lines if line.startswith("expanded "))) > 0
    assert any("ParallelLayout(tensor_model_parallel_size=1" in line for line in lines)
    assert lines[-1] == "--train-iters 0: must be at least 1"
    assert (tmp_path / "runs" / "hf" / "config.json").is_file()


def test_the_page_uses_every_function():
    used = set(re.findall(r"moe_lpr\.(\w+)", "".join(blocks())))
    assert used == set(megatron_moe_lpr.__all__)


def test_importing_the_package_imports_nothing_heavy():
    program = (
        "import sys, megatron_moe_lpr as m; m.upcycle; print(*sorted({'torch', 'megatron.core'} & set(sys.modules)))"
    )
    done = python(program)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda api: api.upcycle("no-such", "x"), "no-such"),
        (lambda api: api.upcycle("data/base_model", "x", num_exprets=3), "--num-exprets"),
        (lambda api: api.upcycle("data/base_model", "x", num_experts="many"), "--num-experts"),
        (lambda api: api.preprocess("none.jsonl", "x", "data/base_model"), "give either --language"),
        (lambda api: api.train({"stage": "1"}), "missing"),
        (lambda api: api.train("none.yaml"), "none.yaml: no such file"),
        (lambda api: api.plan(8), "give either --hf"),
        (lambda api: api.evaluate("none", ["x"]), "none: no such directory"),
        (lambda api: api.export("none", "x"), "none: no such directory"),
    ],
)
def test_mistakes_raise_and_end_nothing(call, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(megatron_moe_lpr.UserError, match=message):
        call(megatron_moe_lpr)
