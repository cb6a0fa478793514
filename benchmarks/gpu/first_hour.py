"""The first hour on a GPU that nobody has tried, in less than ten minutes: is it right, and how fast is it?

Each part runs in a process of its own with a time limit. One that fails is recorded, and the others go on. Ends with a
table and a JSON file; the exit code is 1 where a part failed.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tyro

from benchmarks.gpu.table import peak_tflops, print_table
from benchmarks.gpu.task import StepTask
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.json_files import write_json

ROOT = Path(__file__).parents[2]
CORRECTNESS = ("tests/gpu/test_local.py", "-k", "not layout and not goes_on")
FP32_CORRECTNESS = ("tests/gpu/test_local.py", "-k", "is_chosen or other_families")
QUICK_CORRECTNESS = ("tests/gpu/test_local.py", "-k", "is_chosen")
CORRECTNESS_PART = "correctness (tests/gpu, local)"
TESTS_SECONDS, PART_SECONDS = 240.0, 120.0


@dataclasses.dataclass(frozen=True)
class FirstHour:
    """Check and measure one GPU."""

    output: Path = Path("runs/first_gpu_hour.json")
    """Where to write the figures."""
    quick: bool = False
    """Tiny sizes: tries the program itself; the figures mean nothing."""
    only: tuple[str, ...] = ()
    """Parts to run, by a piece of their names: `correctness`, `"stage 2"`, `transformer_engine`. Default: all."""
    seconds: float = 560.0
    """Parts that have not begun after this time are left out, and the command fails."""

    def run(self) -> None:
        """Run all parts.

        Raises:
            UserError: there is no GPU, no part has a name that `only` asks for, or a part failed.
        """
        end = time.monotonic() + self.seconds
        device = _answer("device", PART_SECONDS)
        if "error" in device:
            raise UserError(device["error"])
        rows: list[dict[str, Any]] = []
        for part in self._parts(device, end):
            rows.append(part())
            self._write(device, rows)
        print_table(device, rows)
        print(f"figures: {self.output}")
        failed = [row["part"] for row in rows if row["status"] != "passed"]
        if failed:
            raise UserError(f"{len(failed)} of {len(rows)} parts did not pass: {'; '.join(failed)}")

    def _parts(self, device: dict[str, Any], end: float) -> list[Callable[[], dict[str, Any]]]:
        """What makes the row of each part."""
        parts: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            (CORRECTNESS_PART, lambda: _correctness(self.quick, device, end - time.monotonic()))
        ]
        for task in tasks(self.quick, fp32=not device["bf16"]):
            fitted = task.fitted(device["memory_bytes"])
            parts.append((task.name, functools.partial(measured, fitted, device, end)))
        chosen = [part for name, part in parts if not self.only or any(piece in name for piece in self.only)]
        if not chosen:
            known = "; ".join(name for name, _ in parts)
            raise UserError(f"--only {' '.join(self.only)}: no part has such a name; there are: {known}")
        return chosen

    def _write(self, device: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """After each part, so that what was measured is kept whatever happens."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_json({"device": device, "quick": self.quick, "parts": rows}, self.output)


def tasks(quick: bool, fp32: bool) -> Iterator[StepTask]:
    """Both stages on each kind of layers that is installed: this project's MoE layer, then Megatron's own."""
    sizes: dict[str, Any] = {"quick": quick, "fp32": fp32}
    if quick:
        sizes |= {"layers": 2, "micro_batch_size": 2, "seq_length": 64}
    engine = importlib.util.find_spec("transformer_engine") is not None
    for kind in ("local", "transformer_engine")[: 1 + engine]:
        for stage in ("1", "2"):
            for stock in (False, True):
                yield StepTask(stage=stage, transformer_impl=kind, stock=stock, **sizes)


def measured(task: StepTask, device: dict[str, Any], end: float) -> dict[str, Any]:
    """The row of a step. Where it does not fit into memory, of a smaller one."""
    while True:
        sizes = {"layers": task.layers, "micro_batch_size": task.micro_batch_size, "seq_length": task.seq_length}
        row = {"part": task.name, **sizes}
        if time.monotonic() > end:
            return row | {"status": "left out", "reason": "no time left"}
        result = _answer(task.dumps(), PART_SECONDS)
        if "error" in result:
            return row | {"status": "failed", "reason": result["error"]}
        smaller = task.smaller()
        if "out_of_memory" not in result:
            return row | {"status": "passed", **result, "mfu": _share_of_peak(result["tflops"], device)}
        if smaller is None:
            return row | {"status": "failed", "reason": result["out_of_memory"]}
        task = smaller


def _share_of_peak(tflops: float | None, device: dict[str, Any]) -> float | None:
    """Of the maker's peak in bf16; where that is unknown, or fp32 is computed, of the product measured here."""
    peak = peak_tflops(device["name"]) if device["bf16"] else None
    peak = peak or device["product_tflops"]
    return None if tflops is None or peak is None else tflops / peak


def _correctness(quick: bool, device: dict[str, Any], seconds: float) -> dict[str, Any]:
    row = {"part": CORRECTNESS_PART}
    if importlib.util.find_spec("pytest") is None:
        return row | {"status": "failed", "reason": "pytest is not installed; pip install -e '.[test]'"}
    tests = QUICK_CORRECTNESS if quick else CORRECTNESS if device["bf16"] else FP32_CORRECTNESS
    plugin = ("-p", "tests.emulation.plugin") if device["emulated"] else ()
    command = [sys.executable, "-m", "pytest", *plugin, "-m", "gpu", *tests]
    done = _process(command, min(seconds, TESTS_SECONDS), {"TRANSFORMER_IMPL": "local"})
    if done.returncode == 0:
        return row | {"status": "passed"}
    log = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E "))]
    return row | {"status": "failed", "reason": "; ".join(log[-5:]) or _last_line(done), "output": done.stdout[-20000:]}


def _answer(what: str, seconds: float) -> dict[str, Any]:
    """What a process of `measure.py` prints last; `error` where it fails."""
    done = _process([sys.executable, "-m", "benchmarks.gpu.measure", what], seconds)
    try:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    except (ValueError, IndexError):
        return {"error": _last_line(done)}


def _process(
    command: list[str], seconds: float, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command on the first GPU to its end or to the limit, by when it is killed."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    variables = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ | {"PYTHONPATH": path} | (environment or {})
    try:
        return subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=max(seconds, 1.0)
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"ended after {seconds:.0f} s")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that says something, and how the process ended."""
    lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    return f"{lines[-1].strip() if lines else 'no output'} (exit code {done.returncode})"


if __name__ == "__main__":
    run_command(tyro.cli(FirstHour, description=__doc__).run)
