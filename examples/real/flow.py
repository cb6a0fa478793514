"""Steps of `make real`: commands of the project that run once, with their time, memory and speed in steps.json."""

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from settings import CORES
from workflow import Workflow

from examples.real.memory import peak_memory
from examples.real.settings import Flags, Settings
from megatron_moe_lpr.files.json_files import write_json

DONE = ".done"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Flow(Workflow):
    """The demo's workflow with the settings of `make real`, and a record of each step."""

    settings: Settings

    @property
    def runs(self) -> Path:
        """Directory of all output."""
        return self.settings.runs

    # Steps

    def step(self, done: Path, title: str, action: Callable[[], object]) -> None:
        """Run `action` unless the file `done` exists, and record it in steps.json, also if it fails."""
        if done.exists():
            super().step(done, title, action)
            return
        start = time.monotonic()
        with peak_memory() as peak:
            try:
                super().step(done, title, action)
            finally:
                self._record(title, time.monotonic() - start, peak.num_bytes, done)

    def _record(self, title: str, seconds: float, peak_bytes: int, done: Path) -> None:
        """Add a start of a step to steps.json. The seconds of an interrupted step's starts add up."""
        file = self.runs / "steps.json"
        steps = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        before = next((step for step in steps if step["name"] == title), None)
        if before is None:
            before = {"name": title, "seconds": 0.0, "peak_memory_bytes": 0}
            steps.append(before)
        before["seconds"] = round(before["seconds"] + seconds, 1)
        before["peak_memory_bytes"] = max(before["peak_memory_bytes"], peak_bytes)
        before["tokens_per_second"] = tokens_per_second(done.parent / METRICS)
        before["done"] = done.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(steps, file)

    # Commands

    def moe_lpr(self, *words: object, **environment: str) -> None:
        """Print and run a command `moe-lpr`. Raises Failed."""
        self.say(f"$ moe-lpr {shlex.join(str(word) for word in words)}")
        self.python("-m", "megatron_moe_lpr.cli", *words, **self.threads | environment)

    @property
    def threads(self) -> dict[str, str]:
        """The environment variable that gives each rank its threads."""
        return {"OMP_NUM_THREADS": str(self.settings.threads or max(1, CORES // self.settings.ranks))}

    def train(
        self, name: str, title: str, stage: str, load: Path, data: Sequence[object], iters: int, flags: Flags
    ) -> Path:
        """Run a stage of training from the checkpoint `load`; an interrupted run resumes. Returns its directory.

        All flags are in RUNS/flags/NAME.yaml, for `moe-lpr train --config`.
        """
        save = self.runs / name
        config = {
            "stage": stage,
            "load": str(load),
            "save": str(save),
            "data_path": [str(word) for word in data],
            "train_iters": iters,
            "original_languages": list(self.settings.original),
            **self.common_flags(),
            **flags,
        }
        file = self.runs / "flags" / f"{name.replace('/', '-')}.yaml"
        self.step(save / DONE, title, lambda: self._train(file, config))
        return save

    def _train(self, file: Path, config: Mapping[str, Any]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
        ranks = ("--standalone", "--local-addr", "localhost", "--nproc-per-node", self.settings.ranks)
        launch = ("launch", *ranks) if self.settings.ranks > 1 else ()
        self.moe_lpr(*launch, "train", "--config", file)

    def common_flags(self) -> dict[str, Any]:
        """Return the flags of every run. A rank's micro-batch is at most its part of the global batch."""
        settings, training = self.settings, dict(self.settings.training)
        share = training["global_batch_size"] // settings.ranks
        training["micro_batch_size"] = max(1, min(training["micro_batch_size"], share))
        return {**training, "seed": settings.seed, settings.precision: True}

    def export(self, load: Path, name: str, title: str) -> Path:
        """Export a checkpoint to the Hugging Face directory of a model, and compare the two. Returns the directory."""
        hf = self.settings.hf(name)
        self.step(hf / "config.json", f"{title}: export", lambda: self.moe_lpr("export", "--load", load, "--hf", hf))
        self.verify(load, hf, f"{title}: comparison of logits")
        return hf

    def verify(self, load: Path, hf: Path, title: str) -> None:
        """Compare the logits of a checkpoint with those of a Hugging Face directory."""
        done = self.runs / "verified" / f"{load.relative_to(self.runs)}-{hf.name}".replace("/", "-")
        self.step(done, title, lambda: self.moe_lpr("verify", "--load", load, "--hf", hf))


def tokens_per_second(metrics: Path, skip: int = 0) -> float | None:
    """Return tokens a second of a run's steps, from its metrics; None: there are none.

    What a run does beside its steps, such as starting and saving, does not count; nor do steps that a resume repeated.

    Args:
        skip: records at the beginning that do not count, as the first step is slow.
    """
    if not metrics.is_file():
        return None
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    speeds = {line["consumed_tokens"]: line["tokens_per_second"] for line in lines if line["kind"] == "train"}
    ends = sorted(speeds)
    parts = list(zip((0, *ends), ends, strict=False))[skip:]
    seconds = sum((end - start) / speeds[end] for start, end in parts)
    return sum(end - start for start, end in parts) / seconds if seconds else None
