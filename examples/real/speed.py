"""Size of models and their speed in generating: tokens a second by vLLM where it is installed, else by transformers."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import costs

from megatron_moe_lpr.conversion.hugging_face.quiet import quiet_transformers
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json, write_json

VLLM = Path(".venv-vllm")
"""Virtual environment of `make test-serving`; the environment variable VLLM names another one, or none if empty."""
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 64, 32, 3
IN_VLLM = """
import json, statistics, sys, time
import torch
from vllm import LLM, SamplingParams
model, prompt_tokens, new_tokens, rounds = sys.argv[1], *map(int, sys.argv[2:5])
dtype = "bfloat16" if torch.cuda.is_available() else "float32"
engine = LLM(model=model, dtype=dtype, max_model_len=512, max_num_seqs=1, enforce_eager=True)
settings = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
times = []
for _ in range(rounds + 1):
    start = time.perf_counter()
    engine.generate([{"prompt_token_ids": list(range(prompt_tokens))}], settings, use_tqdm=False)
    times.append(time.perf_counter() - start)
with open(sys.argv[5], "w") as file:
    json.dump(new_tokens / statistics.median(times[1:]), file)
"""
"""The prompt is a part of the time here; the first round does not count."""


def measure_costs(models: Mapping[str, Path], output: Path, state: str) -> None:
    """Write parameters, active parameters and generated tokens a second of each model, by name, and the engine.

    Args:
        models: Hugging Face directory of each.
        state: what changes if a model does; the same state as in `output` is not measured again.
    """
    python = vllm_python()
    engine = "vLLM" if python else "transformers"
    if output.exists() and [read_json(output).get(name) for name in ("state", "engine")] == [state, engine]:
        print("== size and speed: measured before")
        return
    print(f"== size and speed, by {engine}", flush=True)
    found = in_transformers(models)
    if python:
        for name, hf in models.items():
            found[name]["generated_tokens_per_second"] = in_vllm(python, hf)
    write_json({"state": state, "engine": engine, "models": found}, output)


def in_transformers(models: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return the figures of examples/demo/costs.py: one sequence, the models in turns, the median of some rounds."""
    with tempfile.TemporaryDirectory() as place, quiet_transformers():
        output = Path(place) / "costs.json"
        sizes = ("--prompt-tokens", PROMPT_TOKENS, "--new-tokens", NEW_TOKENS, "--rounds", ROUNDS)
        named = [f"{name}={hf}" for name, hf in models.items()]
        costs.main([str(word) for word in ("--hf", *named, "--output", output, *sizes)])
        return read_json(output)


def vllm_python() -> Path | None:
    """Return the Python of a virtual environment with vLLM, if there is one.

    Raises:
        UserError: the environment variable VLLM names a directory without vLLM.
    """
    if os.environ.get("VLLM") == "":
        return None
    python = Path(os.environ.get("VLLM", VLLM)) / "bin" / "python"
    check = [str(python), "-c", "import vllm"]
    if python.is_file() and subprocess.run(check, capture_output=True, check=False).returncode == 0:
        return python
    if "VLLM" in os.environ:
        raise UserError(f"VLLM={os.environ['VLLM']}: no virtual environment with vLLM")
    return None


def in_vllm(python: Path, hf: Path) -> float:
    """Return tokens a second of one greedy sequence in vLLM, prompt included. Raises UserError: vLLM fails."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "speed.json"
        command = [str(word) for word in (python, "-c", IN_VLLM, hf, PROMPT_TOKENS, NEW_TOKENS, ROUNDS, output)]
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{hf}: vLLM fails: {last}; with VLLM= transformers measures")
        return json.loads(output.read_text())
