"""Steps of the demo, which run once: a second start of a target skips the steps that are done."""

import concurrent.futures
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from settings import CORES, Settings

TOOLS = {"import": "convert_hf.py import", "export": "convert_hf.py export", "expand": "convert_hf.py expand"}
LATEST = "latest_checkpointed_iteration.txt"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # nothing here needs the network
}
_printing = threading.Lock()


class Failed(Exception):
    """A step failed; its command has printed the reason."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Training:
    """A training run of one of the compared methods."""

    name: str
    """Name of its directory below RUNS, and of its evaluation."""
    title: str
    """Title of the step that trains it."""
    stage: str
    load: str
    """Directory of the checkpoint that it starts from."""
    flags: tuple[str, ...] = ()
    share_experts: bool = False
    """Spread the new experts over the ranks (EP). In a review only routers train, so ranks that hold all experts
    exchange hardly any gradient and no tokens."""


@dataclass(frozen=True)
class Workflow:
    """Runs commands of the project with a target's settings."""

    settings: Settings
    label: str = ""
    """Prefix of each printed line, where several workflows run at the same time."""

    def change(self, **fields: Any) -> "Workflow":
        """Return this workflow with other settings."""
        return replace(self, settings=replace(self.settings, **fields))

    # Running

    def say(self, text: str) -> None:
        with _printing:
            print(f"{self.label}{text}", flush=True)

    def step(self, done: Path, title: str, action: Callable[[], object]) -> None:
        """Run `action` unless the file `done` exists, which is written after `action` succeeds."""
        if done.exists():
            self.say(f"== {title}: done before, reusing it")
            return
        self.say(f"== {title}")
        action()
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()

    def run(self, *words: object, **environment: str) -> None:
        """Run a command and print its lines after the label. Raises Failed."""
        command = [str(word) for word in words]
        variables = os.environ | ENVIRONMENT | environment
        if not self.label:
            code = subprocess.run(command, env=variables, check=False).returncode
        else:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
            with subprocess.Popen(command, env=variables, **pipes) as process:
                for line in process.stdout:
                    self.say(line.rstrip("\n"))
            code = process.returncode
        if code:
            raise Failed(code if code > 0 else 128 - code)

    def python(self, *words: object, **environment: str) -> None:
        self.run(sys.executable, *words, **environment)

    def tool(self, name: str, *words: object) -> None:
        self.python(*shlex.split(f"tools/{TOOLS.get(name, name + '.py')}"), *words)

    def demo(self, name: str, *words: object) -> None:
        self.python(f"examples/demo/{name}.py", *words)

    def on_ranks(self, *words: object) -> None:
        # Where the machine's own name does not resolve, as in some containers, torchrun would wait minutes and fail.
        local = ("--standalone", "--local-addr", "localhost", "--nproc-per-node", self.settings.ranks)
        self.python("-m", "torch.distributed.run", *local, *words)

    def beside(self, actions: dict[str, Callable[["Workflow"], None]]) -> None:
        """Run actions at the same time, mark each line with the action's name, and wait for all. Raises Failed."""
        with concurrent.futures.ThreadPoolExecutor(len(actions)) as pool:
            started = [pool.submit(action, replace(self, label=f"{name} | ")) for name, action in actions.items()]
        for one in started:
            one.result()

    # Data

    def tokens(self, name: str, split: str, language: str, *words: object, tokenizer: Path | None = None) -> None:
        """Make the dataset NAME-LANGUAGE from the corpus."""
        source = self.settings.corpus / split / f"{language}.jsonl.zst"
        self.dataset(name, language, source, f"tokens of {name} {language}", *words, tokenizer=tokenizer)

    def dataset(
        self, name: str, language: str, source: Path, title: str, *words: object, tokenizer: Path | None = None
    ) -> None:
        prefix = self.settings.datasets / f"{name}-{language}"
        tokenizer = tokenizer or self.settings.tokenizer or self.settings.base
        flags = ("--input", source, "--language", language, "--tokenizer", tokenizer)
        self.step(
            Path(f"{prefix}.json"),
            title,
            lambda: self.tool("preprocess_data", *flags, "--output-prefix", prefix, *words),
        )

    def prefixes(self, name: str, languages: Iterable[str]) -> list[Path]:
        return [self.settings.datasets / f"{name}-{language}" for language in languages]

    def replay_tokens(self) -> None:
        for language in self.settings.original:
            documents = ("--max-documents", self.settings.replay_documents)
            self.tokens(self.settings.replay, "train", language, *documents)

    def demo_tokens(self) -> None:
        """Make the datasets: training text of the expanded languages, the replay, and validation text."""
        for language in self.settings.expanded:
            self.tokens("train", "train", language)
        self.replay_tokens()
        for language in self.settings.languages:
            self.tokens("valid", "valid", language, "--max-documents", self.settings.validation_documents)

    # Models

    def checkpoint(self, name: str, title: str, *flags: object, hf: Path | None = None) -> None:
        """Convert a Hugging Face model, by default the base model, to the checkpoint RUNS/NAME."""
        save = self.settings.runs / name
        words = ("--hf", hf or self.settings.base, "--save", save, *flags)
        self.step(save / LATEST, title, lambda: self.tool("import", *words))

    def dense(self) -> None:
        self.checkpoint("base", "dense model to Megatron", "--num-experts", 1)

    def mixture(self, *flags: object) -> None:
        experts = ("--num-experts", self.settings.experts, "--moe-layer-freq", self.settings.moe_layers)
        self.checkpoint("moe", f"dense model to a mixture of {self.settings.experts} experts", *experts, *flags)

    def train(self, training: Training) -> None:
        """Run a stage; an interrupted run resumes."""
        settings, save = self.settings, self.settings.runs / training.name
        learns = training.stage != "2"
        batch = settings.stage1_batch if learns else settings.stage2_batch
        flags = (
            *("--stage", training.stage, "--load", self.start(training), "--save", save, settings.precision),
            *("--micro-batch-size", batch // settings.ranks, "--global-batch-size", batch),
            *("--seq-length", settings.length, "--original-languages", *settings.original, "--num-workers", 0),
            *("--log-interval", 20, "--save-interval", 200, "--seed", settings.seed),
            *(self._learning() if learns else self._review()),
            *training.flags,
            *(("--expert-model-parallel-size", settings.ranks) if training.share_experts else ()),
        )
        self.step(save / ".done", training.title, lambda: self.on_ranks("-m", "megatron_moe_lpr.pretrain", *flags))

    def start(self, training: Training) -> Path:
        """Return the directory of the checkpoint that a training starts from."""
        load = Path(training.load)
        return load if len(load.parts) > 1 else self.settings.runs / load

    def _learning(self) -> tuple[object, ...]:
        """Return the flags of stage 1's data: the expanded languages with equal weights."""
        iters = self.settings.stage1_iters
        data = self.prefixes("train", self.settings.expanded)
        rate = ("--lr", self.settings.stage1_lr, "--lr-warmup-iters", iters // 20)
        return "--train-iters", iters, *rate, "--data-path", *data

    def _review(self) -> tuple[object, ...]:
        """Return the flags of a review's data: a third replay of the original languages, two thirds expanded ones."""
        replay = self.prefixes(self.settings.replay, self.settings.original)
        expanded = self.prefixes("train", self.settings.expanded)
        blend = [
            word for weight, prefixes in ((1, replay), (2, expanded)) for one in prefixes for word in (weight, one)
        ]
        rate = ("--lr", self.settings.stage2_lr)
        return "--train-iters", self.settings.stage2_iters, *rate, "--data-path", *blend

    def evaluate(self, name: str, checkpoint: Path | None = None, share_experts: bool = False) -> None:
        """Evaluate on the validation sets of all languages, to RUNS/evaluation/NAME.json."""
        output = self.evaluation(name)
        output.parent.mkdir(parents=True, exist_ok=True)
        flags = (
            *("--load", checkpoint or self.settings.runs / name),
            *("--valid-data-path", *self.prefixes("valid", self.settings.languages)),
            *("--original-languages", *self.settings.original, "--seq-length", self.settings.length),
            *("--micro-batch-size", 8, self.settings.precision, "--output", output),
            *(("--expert-model-parallel-size", self.settings.ranks) if share_experts else ()),
        )
        self.step(output, f"evaluation of {name}", lambda: self.on_ranks("tools/evaluate.py", *flags))

    def evaluation(self, name: str) -> Path:
        return self.settings.runs / "evaluation" / f"{name}.json"

    def export(self, load: Path, hf: Path, title: str) -> None:
        self.step(hf / "config.json", title, lambda: self.tool("export", "--load", load, "--hf", hf))

    def report(self, output: Path, evaluations: dict[str, Path | list[Path]], *flags: object) -> None:
        """Print the table of evaluations by title, and write the report."""
        files = [f"{title}={file}" for title, some in evaluations.items() for file in _listed(some)]
        self.tool("report", "--evaluation", *files, *flags, "--output", output)

    @property
    def all_cores(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(CORES)}


def _listed(some: Path | list[Path]) -> list[Path]:
    return some if isinstance(some, list) else [some]
