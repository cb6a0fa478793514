"""vLLM and llama.cpp as servers on the loopback interface, and requests to them."""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.serving.reference import NEW_TOKENS, Continuation

START_SECONDS = 600
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "2",
}


@contextlib.contextmanager
def serving(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Iterator[str]:
    """Run a server until the block ends; gives its address once /health answers.

    Raises:
        RuntimeError: it ended or did not answer in time; the end of its log is in the message.
    """
    port = _free_port()
    command = [part.replace("PORT", str(port)) for part in command]
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def vllm_command(environment: Path, model: Path, dtype: str = "float32") -> list[str]:
    """vLLM's OpenAI-compatible server."""
    options = f"--host 127.0.0.1 --port PORT --dtype {dtype} --max-model-len 512 --max-num-seqs 8 --enforce-eager"
    # What `vllm serve` runs; that command itself asks for the metadata of a package named vllm, not vllm-cpu.
    program = [str(environment / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    return [*program, "--model", str(model), "--served-model-name", "model", *options.split()]


def llama_cpp_command(environment: Path, gguf: Path, context: int) -> list[str]:
    """llama.cpp's server with two slots of `context` tokens; caches in float32."""
    options = f"--host 127.0.0.1 --port PORT --ctx-size {2 * context} --parallel 2 --threads 2"
    precision = "--cache-type-k f32 --cache-type-v f32 --flash-attn off"
    program = str(environment / "build" / "bin" / "llama-server")
    return [program, "--model", str(gguf), *options.split(), *precision.split()]


def complete_by_vllm(address: str, prompt: list[int]) -> Continuation:
    """160 greedy tokens through /v1/completions."""
    request = {
        "model": "model",
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }
    logprobs = post(f"{address}/v1/completions", request)["choices"][0]["logprobs"]
    tokens = [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]]
    return Continuation(tokens, logprobs["token_logprobs"])


def complete_by_llama_cpp(address: str, prompt: list[int], new_tokens: int = NEW_TOKENS) -> Continuation:
    """Greedy tokens through llama-server's own /completion, whose log-probabilities are those of the whole softmax.

    It keeps no log-probability of a token that leaves a character unfinished: None there.
    """
    request = {
        "prompt": prompt,
        "n_predict": new_tokens,
        "temperature": 0,
        "n_probs": 1,
        "return_tokens": True,
        "cache_prompt": False,
        "samplers": ["temperature"],
    }
    answer = post(f"{address}/completion", request)
    return aligned(answer["tokens"], answer["completion_probabilities"])


def aligned(tokens: list[int], steps: list[dict[str, Any]]) -> Continuation:
    """The steps, some of which are left out, beside the tokens.

    Raises:
        ValueError: the steps are no part of the tokens in the same order.
    """
    numbers: list[float | None] = [None] * len(tokens)
    place = -1
    for step in steps:
        place = tokens.index(step["id"], place + 1)
        numbers[place] = step["logprob"]
    return Continuation(tokens, numbers)


def post(address: str, request: dict[str, Any]) -> dict[str, Any]:
    """One JSON request."""
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=300) as answer:
        return json.load(answer)


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"{log}: the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
