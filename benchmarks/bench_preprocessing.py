"""Measure preprocessing against its limit, the tokenizer's own batch encoding, and its memory against its input.

The limit is `encode_batch` of the Rust tokenizer on texts already in memory, with as many of its own threads as the
pipeline has workers. The pipeline reads and parses files, encodes, appends EOD and writes. Runs alternate, the best of
each counts. Memory is the largest resident set of the main process and of any worker, in a fresh process each.

With --megatron-lm, whole commands are timed too, from their start to their end: Megatron-LM's tools/preprocess_data.py
and ours, on the same file; their tokens must be the same bytes.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zstandard
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer as RustTokenizer

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.data.preparation.documents import DocumentOptions
from megatron_moe_lpr.data.preparation.encoding import BlockEncoder, EncoderOptions
from megatron_moe_lpr.data.preparation.sources import Slice, read_blocks
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.errors import UserError, run_command

ROOT = Path(__file__).parents[1]

CHILD = """
import json, re, resource, sys, time
from megatron_moe_lpr.data.preparation.documents import DocumentOptions
from megatron_moe_lpr.data.preparation.encoding import EncoderOptions
from megatron_moe_lpr.data.preparation.preprocessing import PreprocessingOptions, preprocess
source, output, tokenizer, eod_token, workers = sys.argv[1:6]
encoder = EncoderOptions(tokenizer, eod_token or None, True, DocumentOptions(language="xx"))
start = time.perf_counter()
plan = PreprocessingOptions([source], output, encoder, workers=int(workers), overwrite=True)
(manifest,) = preprocess(plan).values()
rate = (manifest.tokens - manifest.documents) / (time.perf_counter() - start)
# Not ru_maxrss, which a process takes over from the one that started it.
main = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps([rate, main, worker]))
"""
"""A run in a process of its own; prints its tokens/s and the peak MB of that process and of its largest worker."""


@dataclasses.dataclass
class Flags:
    """Measure preprocessing against the tokenizer's own encode_batch."""

    tokenizer: str = str(ROOT / "data" / "base_model")
    """A directory with a tokenizer.json, or the file. Default: the demo's, of 1,024 tokens."""
    megatron_lm: Path | None = None
    """A checkout of Megatron-LM (its tag core_v0.16.1 was tried; it needs the packages six, tiktoken and triton)."""
    input: list[Path] = dataclasses.field(default_factory=lambda: sorted(ROOT.glob("data/help_corpus/train/*.zst")))
    """JSON lines, plain or .zst. Default: the demo corpus."""
    workers: int = len(os.sched_getaffinity(0))
    """Worker processes, and threads of the tokenizer."""
    repeats: int = 5
    """Runs of each."""
    copies: int = 10
    """The larger input of the memory measurement, in copies of the smaller."""
    eod_token: str = ""
    """The end-of-document token, where the tokenizer names none."""


def main() -> None:
    flags = parse_flags(Flags, description=__doc__)
    if not flags.input:
        raise UserError("--input: no files")
    # Before the Rust library starts its threads.
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(flags.workers))
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "once.jsonl"
        source.write_bytes(b"".join(map(read, flags.input)))
        speed(flags, source, Path(directory))
        if flags.megatron_lm:
            commands(flags, source, Path(directory))
        memory(flags, source, Path(directory))


def read(path: Path) -> bytes:
    content = path.read_bytes()
    return zstandard.ZstdDecompressor().decompressobj().decompress(content) if path.suffix == ".zst" else content


def speed(flags: Flags, source: Path, directory: Path) -> None:
    """Best tokens/s of the pipeline, of both batch encoders, and of the design with threads."""
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    library = RustTokenizer.from_file(str(load_tokenizer(flags.tokenizer).path))
    best: dict[str, float] = {}
    for _ in range(flags.repeats):
        for name in ("encode_batch", "encode_batch_fast"):
            best[name] = max(best.get(name, 0.0), encode(getattr(library, name), texts))
        best["threads in one process"] = max(best.get("threads in one process", 0.0), encode_blocks(flags, source))
        best["pipeline"] = max(best.get("pipeline", 0.0), run_pipeline(flags, source, directory)[0])
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    table = Table(title=f"{len(texts):,} documents, {megabytes:.1f} MB, {flags.workers} threads or workers")
    for column in ("what", "tokens/s", "pipeline / this"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, rate in best.items():
        table.add_row(name, f"{rate:,.0f}", f"{best['pipeline'] / rate:.2f}")
    Console(width=100).print(table)


def commands(flags: Flags, source: Path, directory: Path) -> None:
    """Best seconds of whole commands, Megatron-LM's and ours."""
    theirs, ours = directory / "theirs", directory / "ours"
    workers = ["--workers", str(flags.workers)]
    megatron = [flags.megatron_lm / "tools" / "preprocess_data.py", "--input", source, "--output-prefix", theirs]
    tokenizer = plain_tokenizer(flags, directory / "tokenizer")
    megatron += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--append-eod"]
    own = [ROOT / "tools" / "preprocess_data.py", "--input", source, "--language", "xx", "--output-prefix", ours]
    own += ["--tokenizer", flags.tokenizer, "--overwrite"]
    best = {"Megatron-LM": float("inf"), "ours": float("inf")}
    for _ in range(flags.repeats):
        best["Megatron-LM"] = min(best["Megatron-LM"], run_command_line([*megatron, *workers], flags.megatron_lm))
        best["ours"] = min(best["ours"], run_command_line([*own, *workers], ROOT))
    if theirs.with_name("theirs_text_document.bin").read_bytes() != ours.with_name("ours.bin").read_bytes():
        raise UserError("Megatron-LM's preprocess_data.py and ours wrote different tokens")
    table = Table(title="whole commands, start to end; both wrote the same tokens")
    for column in ("tools/preprocess_data.py of", "seconds", "x Megatron-LM"):
        table.add_column(column, justify="left" if column.startswith("tools") else "right")
    for name, seconds in best.items():
        table.add_row(name, f"{seconds:.1f}", f"{best['Megatron-LM'] / seconds:.1f}")
    Console(width=100).print(table)


def plain_tokenizer(flags: Flags, directory: Path) -> Path:
    """The tokenizer without its model: for a model_type of qwen2, transformers 5 splits text by Qwen2's own rules."""
    loaded = load_tokenizer(flags.tokenizer, flags.eod_token or None)
    end = RustTokenizer.from_file(str(loaded.path)).id_to_token(loaded.eod)
    directory.mkdir()
    shutil.copy(loaded.path, directory / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def run_command_line(command: list[object], first_on_path: Path) -> float:
    """Seconds of a command, with one directory in front of the modules' path. Raises UserError where it fails."""
    path = os.pathsep.join([str(first_on_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{command[0]} failed: {result.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - start


def encode(encoder: Callable, texts: list[str]) -> float:
    """Tokens/s of one call."""
    start = time.perf_counter()
    encodings = encoder(texts, add_special_tokens=False)
    elapsed = time.perf_counter() - start
    return sum(map(len, encodings)) / elapsed


def encode_blocks(flags: Flags, source: Path) -> float:
    """Tokens/s of the other design: one process reads, parses and collects, the tokenizer's threads encode."""
    options = EncoderOptions(flags.tokenizer, flags.eod_token or None, True, DocumentOptions(language="xx"))
    encoder = BlockEncoder(load_tokenizer(flags.tokenizer, flags.eod_token or None), options)
    start, tokens = time.perf_counter(), 0
    for block in read_blocks(Slice(str(source), 0, source.stat().st_size), []):
        documents = encoder.encode(block).languages["xx"]
        tokens += len(documents.tokens) - len(documents.lengths)
    return tokens / (time.perf_counter() - start)


def run_pipeline(flags: Flags, source: Path, directory: Path) -> tuple[float, float, float]:
    """Tokens/s of one whole run (start of the workers to manifest), peak MB of the main process and of a worker."""
    arguments = [str(source), str(directory / "out"), flags.tokenizer, flags.eod_token, str(flags.workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", CHILD, *arguments], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"the pipeline failed: {result.stderr.strip().splitlines()[-1]}")
    rate, main_process, worker = json.loads(result.stdout)
    return rate, main_process, worker


def memory(flags: Flags, source: Path, directory: Path) -> None:
    """Peak resident memory at once and at `copies` times the input."""
    table = Table(title="the pipeline at two sizes of input")
    for column in ("input MB", "tokens/s", "main process, peak MB", "largest worker, peak MB"):
        table.add_column(column, justify="right")
    large = directory / "large.jsonl"
    with open(large, "wb") as file:
        for _ in range(flags.copies):
            file.write(source.read_bytes())
    for name in (source, large):
        rate, main_process, worker = run_pipeline(flags, name, directory)
        table.add_row(f"{name.stat().st_size / 1e6:.1f}", f"{rate:,.0f}", f"{main_process:.0f}", f"{worker:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    run_command(main)
