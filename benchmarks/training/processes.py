"""A candidate in its own processes, which rest between its steps."""

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_moe_lpr.errors import UserError

ROOT = Path(__file__).parents[2]
PROFILE = "profile"
CORES = 2
"""Cores of a candidate: threads of one process, or ranks of one thread each."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step: the longest time of all ranks, and the sums of their CPU time and memory."""

    seconds: float
    cpu_seconds: float
    loss: float
    peak_megabytes: float


class Candidate:
    """Starts its processes at once; `steps` waits for them."""

    def __init__(self, name: str, task: dict[str, Any], work: Path, ranks: int = 1) -> None:
        self.name, self.precision, self.ranks = name, task["precision"], ranks
        self.log = work / f"{name}-{self.precision}.log".replace(" ", "-")
        self.measured: list[Step] = []
        port = free_port()
        with open(self.log, "wb") as log:
            self.processes = [self._start(task, rank, port, log) for rank in range(ranks)]

    def __enter__(self) -> "Candidate":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def steps(self, count: int) -> list[Step]:
        """Take steps while all other candidates rest.

        Raises:
            UserError: the program has ended; with the last line that it printed.
        """
        self._ask(str(count))
        return [self._answer() for _ in range(count)]

    def profile(self) -> dict[str, float]:
        """Return the shares of a step's time by kind of operation, on rank 0."""
        self._ask(PROFILE)
        return json.loads(self._lines()[0])

    def measure(self, count: int) -> None:
        """Take steps and keep their measurements."""
        self.measured += self.steps(count)

    @property
    def seconds(self) -> float:
        """Median seconds of a step."""
        return statistics.median(step.seconds for step in self.measured)

    @property
    def cpu_seconds(self) -> float:
        """Median CPU seconds of a step."""
        return statistics.median(step.cpu_seconds for step in self.measured)

    @property
    def peak_megabytes(self) -> float:
        """Largest resident memory of all ranks together."""
        return max(step.peak_megabytes for step in self.measured)

    def _start(self, task: dict[str, Any], rank: int, port: int, log: Any) -> subprocess.Popen:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(CORES // self.ranks),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.training.candidates", json.dumps(task)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )

    def _answer(self) -> Step:
        answers = [Step(**json.loads(line)) for line in self._lines()]
        return Step(
            max(answer.seconds for answer in answers),
            sum(answer.cpu_seconds for answer in answers),
            answers[0].loss,
            sum(answer.peak_megabytes for answer in answers),
        )

    def _ask(self, line: str) -> None:
        for process in self.processes:
            try:
                process.stdin.write(f"{line}\n".encode())
                process.stdin.flush()
            except BrokenPipeError:
                raise self._failure() from None

    def _lines(self) -> list[bytes]:
        lines = [process.stdout.readline() for process in self.processes]
        if not all(lines):
            raise self._failure()
        return lines

    def _failure(self) -> UserError:
        said = self.log.read_text(errors="replace").strip().splitlines() or ["nothing was said"]
        return UserError(f"{self.name}, {self.precision}: ended early: {said[-1]}")


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
