"""vLLM and llama.cpp as servers on the loopback interface, and requests to them."""

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.distributed import free_port
from tests.serving.reference import NEW_TOKENS, Continuation

# A quiet machine needs one minute; one with a hundred busy processes took more than ten.
START_SECONDS = 1800
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
    port = free_port()
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
        _end(process)


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
    """Greedy tokens through /v1/completions."""
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


def chat_by_vllm(address: str, messages: list[dict[str, str]]) -> Continuation:
    """Greedy tokens through /v1/chat/completions, where the server applies the chat template."""
    request = {
        "model": "model",
        "messages": messages,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "logprobs": True,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }
    steps = post(f"{address}/v1/chat/completions", request)["choices"][0]["logprobs"]["content"]
    tokens = [int(step["token"].removeprefix("token_id:")) for step in steps]
    return Continuation(tokens, [step["logprob"] for step in steps])


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
    """The steps, some of which are left out, beside the tokens; None too where a step could stand in two places.

    Raises:
        ValueError: the steps are no part of the tokens in the same order.
    """
    ids = [step["id"] for step in steps]
    earliest = _places(tokens, ids)
    latest = [len(tokens) - 1 - place for place in reversed(_places(tokens[::-1], ids[::-1]))]
    numbers: list[float | None] = [None] * len(tokens)
    for step, first, last in zip(steps, earliest, latest, strict=True):
        if first == last:
            numbers[first] = step["logprob"]
    return Continuation(tokens, numbers)


def _places(tokens: list[int], ids: list[int]) -> list[int]:
    places = []
    for one in ids:
        places.append(tokens.index(one, places[-1] + 1 if places else 0))
    return places


def post(address: str, request: dict[str, Any]) -> dict[str, Any]:
    """One JSON request."""
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=300) as answer:
        return json.load(answer)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    # vLLM computes in a child, which outlives a parent that was killed.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    end_of_log = log.read_text(errors="replace")[-3000:].rstrip()
    if process.poll() is None:
        raise RuntimeError(f"{end_of_log}\n{log.name}: the server did not answer within {START_SECONDS} s")
    raise RuntimeError(f"{log.name}: the server ended with {process.returncode}:\n{end_of_log}")
