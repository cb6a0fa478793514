"""A training run of a tiny model that can be started, watched and disturbed from outside."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_moe_lpr.checkpoint.format.directory import LATEST_FILE
from megatron_moe_lpr.training.logs.metrics import METRICS_FILE
from tests.distributed import free_port

STEPS, SAVE_INTERVAL, RANKS = 150, 3, 2
PATIENCE = 300.0
"""Seconds for what takes one on a quiet machine."""
MARK = "MOE_LPR_ENDURANCE"
"""Environment variable by which every process of a run is found, whoever its parent is by now."""
COMPARED = ("lm_loss", "grad_norm", "lr", "load_balancing_loss")
PROGRAMS = {
    "launcher": ("megatron_moe_lpr.launch",),
    "torchrun": ("torch.distributed.run",),
    "worker": ("megatron_moe_lpr.pretrain",),
    "writer": ("writer_process", "spawn_main"),
}


class Failure(Exception):
    """Something promised did not happen."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What all runs start from."""

    work: Path
    checkpoint: Path
    data: dict[str, str]


def make_inputs(work: Path) -> Inputs:
    """A model of four layers with five experts, and two languages; made once."""
    from tests.training.runs import make_checkpoint, make_data

    if (work / "checkpoint").exists():
        return Inputs(work, work / "checkpoint", {language: str(work / language) for language in ("el", "en", "hu")})
    work.mkdir(parents=True)
    return Inputs(work, make_checkpoint(work), make_data(work))


class TrainingRun:
    """A --save directory and the processes that write to it."""

    def __init__(self, inputs: Inputs, save: Path, *flags: str, by: str = "launcher") -> None:
        self.inputs, self.save, self.flags, self.by = inputs, save, flags, by
        self.mark = uuid.uuid4().hex
        self.output = save.with_name(f"{save.name}.out")
        self.launcher: subprocess.Popen | None = None
        self.begin = 0

    def start(self, *flags: str, by: str | None = None) -> "TrainingRun":
        """Start the launcher; its output begins anew."""
        with self.output.open("wb") as output:
            self.launcher = subprocess.Popen(
                self.command(*flags, by=by), env=self.environment(), stdout=output, stderr=subprocess.STDOUT
            )
        return self

    def command(self, *flags: str, by: str | None = None) -> list[str]:
        """The command line of a start."""
        program = PROGRAMS[by or self.by][0]
        values = {
            "stage": 1, "load": self.inputs.checkpoint, "save": self.save, "train-iters": STEPS,
            "save-interval": SAVE_INTERVAL, "micro-batch-size": 1, "global-batch-size": 4, "seq-length": 32,
            "num-workers": 1, "log-interval": 1, "lr": 1e-3, "platform": "cpu", "expert-model-parallel-size": RANKS,
        }  # fmt: skip
        return [
            *(sys.executable, "-m", program, "--nproc-per-node", str(RANKS), "--master-port", str(free_port())),
            *("-m", "megatron_moe_lpr.pretrain", "--use-distributed-optimizer", "--fp32"),
            *(str(part) for name, value in values.items() for part in (f"--{name}", value)),
            *("--data-path", self.inputs.data["el"], self.inputs.data["hu"], "--original-languages", "en"),
            *self.flags,
            *flags,
        ]

    def environment(self) -> dict[str, str]:
        """Of every process of this run."""
        return os.environ | {"OMP_NUM_THREADS": "1", MARK: self.mark, "PYTHONPATH": os.getcwd()}

    def wait(self, seconds: float = PATIENCE) -> int:
        """Exit code of the launcher."""
        try:
            return self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failure(f"the launcher still runs after {seconds:.0f} s: {self.tail()}") from None

    def wait_for(self, condition: Callable[[], object], what: str, pause: float = 0.001) -> None:
        """Wait until something can be seen while the run runs."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.launcher.poll() is not None:
                raise Failure(f"ended before {what}: exit code {self.launcher.returncode}: {self.tail()}")
            if time.monotonic() > deadline:
                raise Failure(f"no {what} in {PATIENCE:.0f} s: {self.tail()}")
            time.sleep(pause)

    def wait_for_steps(self, count: int) -> None:
        """Wait until the run has logged so many steps more than now."""
        file = self.save / METRICS_FILE

        def lines() -> int:
            return file.read_bytes().count(b'"train"') if file.exists() else 0

        # A start may first take back what was logged after its checkpoint.
        self.wait_for(lambda: "step " in self.text(), "the first step", 0.02)
        begin = lines()
        self.wait_for(lambda: lines() >= begin + count, f"{count} steps", 0.005)

    def processes(self) -> list[psutil.Process]:
        """All that live and belong to this run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def workers(self) -> list[psutil.Process]:
        """The ranks, in order; not their data workers, which are forked from them."""
        found = {}
        for process in self.processes():
            try:
                line, environment = " ".join(process.cmdline()), process.environ()
                if "megatron_moe_lpr.pretrain" in line and "RANK" in environment and self._is_started(process):
                    found[int(environment["RANK"])] = process
            except psutil.NoSuchProcess:
                continue
        return [found[rank] for rank in sorted(found)]

    def _is_started(self, process: psutil.Process) -> bool:
        return process.ppid() == self.launcher.pid

    def writers(self) -> list[psutil.Process]:
        """The checkpoint writers, in the order of their ranks."""
        found = []
        for process in self.processes():
            try:
                if any(name in " ".join(process.cmdline()) for name in PROGRAMS["writer"]):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return sorted(found, key=lambda process: int(process.environ()["RANK"]))

    def wait_until_all_ended(self, seconds: float = 60.0) -> None:
        """Nothing of a run may outlive it, whoever was killed. Not even for long."""
        deadline = time.monotonic() + seconds
        while alive := self.processes():
            if time.monotonic() > deadline:
                raise Failure(f"still alive after {seconds:.0f} s: {_names(alive)}")
            time.sleep(0.05)
        if self.launcher:
            self.launcher.wait()

    def kill_all(self) -> str:
        """End what is left; its names."""
        left = self.processes()
        names = _names(left)
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        if self.launcher:
            self.launcher.wait()
        return names

    def latest(self) -> int | None:
        """Step of the latest checkpoint."""
        file = self.save / LATEST_FILE
        return int(file.read_text()) if file.exists() else None

    def iteration_directory(self) -> Path:
        """The latest checkpoint."""
        return self.save / f"iter_{self.latest():07d}"

    def partial_directories(self) -> list[str]:
        """Checkpoints that are not complete."""
        return sorted(path.name for path in self.save.glob(".*") if "partial" in path.name)

    def records(self) -> list[dict]:
        """Of every step that was logged, in the order of writing; one cut line at the end does not count."""
        file = self.save / METRICS_FILE
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [record for record in map(json.loads, lines) if record["kind"] == "train"]

    def steps(self) -> dict[int, dict]:
        """By step; of one that was computed twice the later."""
        return {record["iteration"]: record for record in self.records()}

    def check_steps(self, expected: dict[int, dict[str, float]]) -> None:
        """Every step that was ever logged, also twice, is the undisturbed run's to the bit."""
        for record in self.records():
            step = record["iteration"]
            differing = [name for name in COMPARED if record[name] != expected[step][name]]
            if differing:
                raise Failure(f"step {step} differs in {differing}: {[record[name] for name in differing]}")

    def text(self) -> str:
        """What the last start has said."""
        return self.output.read_text(errors="replace")

    def last_step(self) -> int | None:
        """The last step that the last start has told of."""
        return max((int(step.replace(",", "")) for step in re.findall(r"\| step ([\d,]+)/", self.text())), default=None)

    def errors(self) -> list[str]:
        """Its `error:` lines."""
        return [line[line.index("error:") :] for line in self.text().splitlines() if "error: " in line]

    def tail(self, lines: int = 6) -> str:
        """The end of what it has said."""
        return " / ".join(self.text().splitlines()[-lines:])

    def keep_output(self, name: str) -> None:
        """Where a failure can be looked at."""
        if self.output.exists():
            words = "".join(letter if letter.isalnum() else "-" for letter in name)
            self.output.replace(self.output.with_name(f"MISSED-{words}-{time.strftime('%H%M%S')}.out"))
            self.output.touch()


def reference_steps(inputs: Inputs) -> dict[int, dict[str, float]]:
    """The undisturbed run: what each step is compared with."""
    run = TrainingRun(inputs, inputs.work / "undisturbed")
    if len(run.steps()) < STEPS:
        code = run.start().wait(3 * PATIENCE)
        if code:
            raise Failure(f"the undisturbed run ends with {code}: {run.tail()}")
        run.wait_until_all_ended()
    steps = run.steps()
    if sorted(steps) != list(range(1, STEPS + 1)):
        raise Failure("the undisturbed run has not logged every step")
    return {step: {name: record[name] for name in COMPARED} for step, record in steps.items()}


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    """A signal to each."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _names(processes: list[psutil.Process]) -> str:
    names = []
    for process in processes:
        try:
            names.append(f"{process.pid} {' '.join(process.cmdline()[1:4])}")
        except psutil.NoSuchProcess:
            continue
    return ", ".join(names)
