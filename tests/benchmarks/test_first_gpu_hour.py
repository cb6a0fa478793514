"""The first hour on a GPU: what is recorded of parts that fail, and its figures against closed forms."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.gpu import first_hour
from benchmarks.gpu.first_hour import FirstHour, measured, tasks
from benchmarks.gpu.profiling import covered, launches
from benchmarks.gpu.table import peak_tflops, print_table
from benchmarks.gpu.task import StepTask
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.parameters import describe_model

ROOT = Path(__file__).parents[2]
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "emulated": False,
    "memory_bytes": 80e9,
    "bf16": True,
    "torch": "2.13.0",
    "built_for": "CUDA 13.0",
    "product_tflops": 700.0,
}
FIGURES = {"loss": 1.5, "tokens_per_second": 20000.0, "tflops": 494.5, "memory_gb": 61.25, "launches": 1900}
FIGURES |= {"host_bound": 0.25}
TASK = StepTask("1", "local")
LATER = float("inf")


def answers(monkeypatch, function) -> list[str]:
    """Let `function` stand for the measuring processes; what they were asked, in order."""
    asked = []
    monkeypatch.setattr(first_hour, "_answer", lambda what, seconds: (asked.append(what), function(what))[1])
    return asked


def test_a_step_that_does_not_fit_is_tried_smaller(monkeypatch):
    def fits(what):
        task = StepTask(**json.loads(what))
        return FIGURES if (task.micro_batch_size, task.layers) == (1, 6) else {"out_of_memory": "CUDA out of memory"}

    asked = answers(monkeypatch, fits)
    row = measured(TASK, H100, LATER)
    tried = [(task["micro_batch_size"], task["layers"]) for task in map(json.loads, asked)]
    assert tried == [(4, 24), (2, 24), (1, 24), (1, 12), (1, 6)]
    assert (row["status"], row["layers"], row["micro_batch_size"]) == ("passed", 6, 1)
    assert row["mfu"] == pytest.approx(0.5)


def test_what_never_fits_failed(monkeypatch):
    answers(monkeypatch, lambda what: {"out_of_memory": "CUDA out of memory"})
    row = measured(TASK, H100, LATER)
    assert (row["status"], row["reason"], row["layers"]) == ("failed", "CUDA out of memory", 1)


def test_no_part_begins_after_the_end(monkeypatch):
    asked = answers(monkeypatch, lambda what: FIGURES)
    assert measured(TASK, H100, time.monotonic() - 1)["status"] == "left out"
    assert not asked


def test_a_failed_part_is_recorded_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def answer(what):
        if what == "device":
            return H100
        task = StepTask(**json.loads(what))
        return {"error": "CUDA error: an illegal memory access"} if task.stock and task.stage == "1" else FIGURES

    answers(monkeypatch, answer)
    monkeypatch.setattr(first_hour, "_correctness", lambda *given: {"part": "correctness", "status": "passed"})
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    output = tmp_path / "new" / "figures.json"
    with pytest.raises(UserError, match=r"^1 of 5 parts did not pass: stage 1, local, Megatron's MoE layer$"):
        FirstHour(output).run()
    recorded = json.loads(output.read_text())
    assert [part["status"] for part in recorded["parts"]] == ["passed", "passed", "failed", "passed", "passed"]
    assert recorded["parts"][2]["reason"] == "CUDA error: an illegal memory access"
    shown = capsys.readouterr().out
    assert "failed: stage 1, local, Megatron's MoE layer: CUDA error: an illegal memory access" in shown
    assert shown.count("20,000") == 3


def test_only_the_parts_that_are_asked_for(monkeypatch, tmp_path):
    asked = answers(monkeypatch, lambda what: H100 if what == "device" else FIGURES)
    monkeypatch.setattr(first_hour, "_correctness", lambda *given: pytest.fail("was not asked for"))
    output = tmp_path / "figures.json"
    FirstHour(output, only=("stage 2, local",)).run()
    recorded = [part["part"] for part in json.loads(output.read_text())["parts"]]
    assert recorded == ["stage 2, local, MoE-LPR", "stage 2, local, Megatron's MoE layer"]
    assert len(asked) == 3
    with pytest.raises(UserError, match=r"^--only stage 3: no part has such a name; there are: correctness \("):
        FirstHour(output, only=("stage 3",)).run()


def test_processes_that_die_or_hang_have_a_reason(tmp_path):
    died = first_hour._process([sys.executable, "-c", "import os; print('last words'); os._exit(9)"], 60)
    assert first_hour._last_line(died) == "last words (exit code 9)"
    hung = first_hour._process([sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert first_hour._last_line(hung) == "ended after 1 s (exit code 124)"


def test_without_a_gpu_it_stops_in_one_line(tmp_path):
    output = tmp_path / "figures.json"
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "examples/first_gpu_hour.sh", "--quick", "--output", output]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith("error: PyTorch ") and "sees no GPU; check nvidia-smi or rocm-smi" in done.stderr
    assert done.stderr.count("\n") == 1 and not output.exists()


def test_every_stage_with_each_kind_of_layers(monkeypatch):
    monkeypatch.setattr(first_hour.importlib.util, "find_spec", lambda name: object())
    found = [(task.transformer_impl, task.stage, task.stock) for task in tasks(quick=True, fp32=False)]
    assert len(set(found)) == len(found) == 8
    monkeypatch.setattr(first_hour.importlib.util, "find_spec", lambda name: None)
    assert {task.transformer_impl for task in tasks(quick=False, fp32=True)} == {"local"}


def test_bytes_of_a_step_are_those_of_its_parameters():
    """But for norms, biases and routers: two bytes each, and sixteen more for each weight of five trained experts."""
    parameters = list(describe_model(read_architecture(TASK.config), (6,) * 24, (), ()))
    matrices = sum(parameter.size for parameter in parameters)
    trained = sum(parameter.size for parameter in parameters if "mlp.experts" in parameter.name)
    assert TASK.parameter_bytes() == pytest.approx(2 * matrices + 16 * trained, rel=0.002)


@pytest.mark.parametrize(("gigabytes", "layers"), [(141, 24), (80, 12), (40, 6), (24, 3), (2, 1)])
def test_layers_that_fit_a_device(gigabytes, layers):
    assert TASK.fitted(gigabytes * 1e9).layers == layers


def test_peaks_by_the_longest_name():
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA L40S") == 362.0
    assert peak_tflops("Some other device") is None


def test_launches_and_busy_time():
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "hipLaunchKernel", "hipModuleLaunchKernel"]
    assert launches([*names, "cudaMemcpyAsync", "aten::mm", "cudaStreamSynchronize"]) == len(names)
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.75)]) == 4
    assert covered([]) == 0


def test_an_emulated_device_has_no_speed_in_its_table():
    console = Console(width=200, file=io.StringIO())
    device = H100 | {"emulated": True, "product_tflops": None}
    row = {"part": "stage 1", "layers": 2, "micro_batch_size": 1, "status": "passed", "mfu": None}
    print_table(device, [row | dict.fromkeys(FIGURES) | {"loss": 2.0}], console)
    shown = console.file.getvalue()
    assert "EMULATED" in shown and "2.000" in shown and "%" not in shown
