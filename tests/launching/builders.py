"""A tiny dense model with a tokenizer, and the environment that lets the example scripts train it on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe_lpr.conversion.import_options import ImportOptions
from megatron_moe_lpr.conversion.importer import import_hf
from tests.conversion.tiny_models import COMMON
from tests.data.builders import CORPUS, make_hf_tokenizer, run_plan
from tests.distributed import free_port

ROOT = Path(__file__).parents[2]
VOCABULARY = 800
LANGUAGES = {"EXPANDED": "el", "ORIGINAL": "en"}
SIZES = {"SEQ_LENGTH": 32, "MICRO_BATCH": 2, "GLOBAL_BATCH": 8, "LR": "1e-3", "LOG_INTERVAL": 1}


def save_dense_model(directory: Path) -> Path:
    """Write a Qwen2 of two layers with random weights, and a byte-level tokenizer."""
    make_hf_tokenizer(directory)
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **{**COMMON, "vocab_size": VOCABULARY, "num_hidden_layers": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def prepare_inputs(work: Path) -> Path:
    """Make the checkpoint and datasets of convert_qwen.sh and preprocess.sh in `work`, without starting processes."""
    import_hf(ImportOptions(hf=save_dense_model(work / "dense"), num_experts=5), work / "moe", False)
    (work / "data").mkdir()
    for name in ("train-el", "review-el", "review-en", "valid-el", "valid-en"):
        language = name.split("-")[1]
        source = CORPUS / "valid" / f"{language}.jsonl.zst"
        run_plan(source, work / "data" / name, work / "dense", language, max_documents=5)
    return work


def environment(work: Path, **settings: object) -> dict[str, str]:
    """Return the environment of the example scripts for `work`, on the CPU."""
    own = {
        "PLATFORM": "cpu",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": 1,
        "MASTER_PORT": free_port(),  # neither 29500 nor one from a job's number: others train on this machine
        "HF": work / "dense",
        "DATA": work / "data",
        "WORKERS": 1,
        "REVIEW_EXPANDED": 20,
        "REVIEW_ORIGINAL": 20,
        **SIZES,
        **LANGUAGES,
        **settings,
    }
    return {**os.environ, **{name: str(value) for name, value in own.items()}}


def fake_python(directory: Path, text: str = 'echo "$@"') -> Path:
    """Write a program that stands in for Python: it runs examples/train.py, and shell code for all other arguments."""
    path = directory / "python"
    path.write_text(
        f'#!/usr/bin/env bash\n[[ "${{1:-}}" != */examples/train.py ]] || exec {sys.executable} "$@"\n{text}\n'
    )
    path.chmod(0o755)
    return path


def run_script(
    name: str, work: Path, *arguments: str, timeout: int = 300, **settings: object
) -> subprocess.CompletedProcess:
    """Run examples/NAME in `work` as a user would."""
    return subprocess.run(
        ["bash", str(ROOT / "examples" / name), *arguments],
        cwd=work,
        env=environment(work, **settings),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
