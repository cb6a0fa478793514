"""What twice the feed-forward computation of a top-2 mixture costs in vLLM: tokens a second, dense base against MoE."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.conversion.helpers import run
from tests.serving import models, servers

SIZES = {
    **models.SIZES,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "initializer_range": 0.02,
}
NEW_TOKENS = 96
PARALLEL = (1, 4)
REPEATS = 3


def print_throughput(environment: Path, root: Path) -> None:
    """Make both models and measure; bfloat16, random Qwen2, 6 experts in all layers."""
    dense, moe = root / "speed_dense", root / "speed_moe"
    models.make_dense("qwen2", SIZES, dense, torch.bfloat16)
    run("import", "--hf", dense, "--save", root / "speed_checkpoint", "--num-experts", 6)
    run("export", "--load", root / "speed_checkpoint", "--hf", moe)
    rates = {name: _rates(environment, path) for name, path in (("dense", dense), ("MoE", moe))}
    print(
        f"vLLM, bfloat16, Qwen2 of hidden {SIZES['hidden_size']}, FFN {SIZES['intermediate_size']}, "
        f"{SIZES['num_hidden_layers']} layers; MoE: 6 experts, top 2. Generated tokens a second, median of {REPEATS}:"
    )
    for count in PARALLEL:
        first, second = rates["dense"][count], rates["MoE"][count]
        print(f"  {count} at once: dense {first:.1f}, MoE {second:.1f} ({second / first:.0%} of dense)")


def _rates(environment: Path, model: Path) -> dict[int, float]:
    command = servers.vllm_command(environment, model, "bfloat16")
    log = model.with_suffix(".log")
    with servers.serving(command, log, servers.VLLM_ENVIRONMENT) as address:
        _seconds(address, 1)
        return {
            count: count * NEW_TOKENS / sorted(_seconds(address, count) for _ in range(REPEATS))[REPEATS // 2]
            for count in PARALLEL
        }


def _seconds(address: str, count: int) -> float:
    request = {"model": "model", "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    begin = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        requests = [request | {"prompt": [number + 5, 17, 301]} for number in range(count)]
        list(pool.map(lambda one: servers.post(f"{address}/v1/completions", one), requests))
    return time.monotonic() - begin
