#!/usr/bin/env python3
"""Memory and time of tools/convert_hf.py on a synthetic checkpoint of some gigabytes, beside `cp -r` of its output.

Each command runs in a fresh process. The peak is that process's resident memory; what counts is how far it lies above
the two largest tensors. Time is compared with copying the same bytes in the same run, because disks differ.
"""

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from megatron_moe_lpr.command_line import parse_flags

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "convert_hf.py"
# 1.24 billion parameters: 2.5 GB in bf16, two tensors of 622 MB among them.
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# The child writes the checkpoint, so that this process stays small: a child inherits its parent's peak for a moment.
SYNTHESISE = """
import json, sys, torch
from pathlib import Path
from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.model.tensors import DENSE_LAYOUT, model_rows
from megatron_moe_lpr.conversion.hugging_face.safetensors_writer import TensorSpec, write_safetensors
from megatron_moe_lpr.model.configuration.architecture import read_architecture
directory = Path(sys.argv[1])
architecture = read_architecture(json.loads((directory / "config.json").read_text()))
rows = model_rows(architecture, [1] * architecture.num_layers, DENSE_LAYOUT)
pairs = [pair for row in rows for pair in zip(row.names, row.shapes)]
specs = [TensorSpec(name, shape, torch.bfloat16) for name, shape in pairs]
write_safetensors(directory, specs, lambda spec: torch.randn(spec.shape).bfloat16(), 1_000_000_000)
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes of the benchmark."""

    layers: int = 12
    """Layers of 103 MB each; the embeddings add 1.2 GB."""
    num_experts: int = 3
    """Experts per layer of the upcycled checkpoint."""
    repeats: int = 3
    """Times are medians of this many runs."""
    directory: Path = Path(tempfile.gettempdir())
    """Where the files go; removed afterwards."""
    threads: int = 2
    """OMP_NUM_THREADS of the conversions."""


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    cpu_seconds: float
    peak: float
    """Resident memory, in gigabytes."""


def timed(command: list[str | Path], threads: int) -> Cost:
    """Run a fresh process."""
    os.sync()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    start = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status:
        sys.exit(f"error: {command} failed: {errors}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


def measure(name: str, command: list[str | Path], output: Path, options: Options, largest_two: float) -> None:
    """Run `command` and `cp -r` of what it wrote in turns, and print one line of the table."""
    conversions, copies = [], []
    for _ in range(options.repeats):
        shutil.rmtree(output, ignore_errors=True)
        conversions.append(timed(command, options.threads))
        copy = output.with_name(output.name + "-copy")
        copies.append(timed(["cp", "-r", output, copy], options.threads))
        shutil.rmtree(copy)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) / 1e9
    peak = max(cost.peak for cost in conversions)
    ours, theirs = (statistics.median(cost.seconds for cost in costs) for costs in (conversions, copies))
    cpu, copy_cpu = (statistics.median(cost.cpu_seconds for cost in costs) for costs in (conversions, copies))
    print(
        f"| {name} | {size:.2f} GB | {peak:.2f} GB | {peak - largest_two:+.2f} GB | {ours:.1f} s | {theirs:.1f} s "
        f"| {ours / theirs:.1f} | {cpu:.1f} s | {copy_cpu:.1f} s |",
        flush=True,
    )


def main(options: Options) -> None:
    """Synthesise, convert there and back, dense and upcycled."""
    work = Path(tempfile.mkdtemp(prefix="bench-conversion-", dir=options.directory))
    try:
        dense = work / "dense"
        dense.mkdir()
        (dense / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": options.layers}))
        timed([sys.executable, "-c", SYNTHESISE, dense], options.threads)
        vocabulary = CONFIG["vocab_size"] * CONFIG["hidden_size"] * 2 / 1e9
        print(f"two largest tensors: {2 * vocabulary:.2f} GB")
        print("| command | output | peak | beyond the two largest | time | cp -r | ratio | CPU | CPU of cp |")
        print("|---|---|---|---|---|---|---|---|---|")
        for experts in (1, options.num_experts):
            checkpoint, back = work / f"checkpoint-{experts}", work / f"hf-{experts}"
            python = [sys.executable, TOOL]
            load = [*python, "import", "--hf", dense, "--save", checkpoint, "--num-experts", experts]
            save = [*python, "export", "--load", checkpoint, "--hf", back]
            measure(f"import, {experts} expert(s)", load, checkpoint, options, 2 * vocabulary)
            measure(f"export, {experts} expert(s)", save, back, options, 2 * vocabulary)
            shutil.rmtree(checkpoint)
            shutil.rmtree(back)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main(parse_flags(Options, description=__doc__))
