"""Measure the cost of exported models: parameters, parameters that a token uses, and tokens/s in transformers.

python examples/demo/costs.py --hf "Base model=data/base_model" "MoE-LPR=runs/paper/hf/moe_lpr" --output costs.json
"""

import dataclasses
import os
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.conversion.hugging_face.quiet import quiet_transformers
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.atomic_file import check_output_file
from megatron_moe_lpr.files.json_files import write_json


@dataclasses.dataclass
class Flags:
    """Measure the cost of exported models."""

    hf: list[str]
    """TITLE=DIRECTORY of each Hugging Face model; the others are compared with the first."""
    output: Path
    """JSON file to write: for each title parameters, active_parameters, prompt_tokens_per_second and
    generated_tokens_per_second."""
    prompt_tokens: int = 256
    """Tokens of the prompt."""
    new_tokens: int = 64
    """Tokens to generate, one at a time."""
    rounds: int = 5
    """Rounds, in each of which every model is measured once; the median counts."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    check_output_file(flags.output, "--output")
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    models = {}
    for argument in flags.hf:
        title, _, directory = argument.rpartition("=")
        if not title:
            raise UserError(f"--hf {argument}: write TITLE=DIRECTORY")
        with quiet_transformers():
            models[title] = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    times = {title: ([], []) for title in models}
    # The first round only compiles kernels and fills caches.
    for turn in range(flags.rounds + 1):
        for title, model in models.items():
            for seconds, taken in zip(times[title], prompt_and_generation_seconds(model.eval(), flags), strict=True):
                seconds += [taken] if turn else []
    costs = {
        title: {
            "parameters": model.num_parameters(),
            "active_parameters": active_parameters(model),
            "prompt_tokens_per_second": flags.prompt_tokens / statistics.median(times[title][0]),
            "generated_tokens_per_second": flags.new_tokens / statistics.median(times[title][1]),
        }
        for title, model in models.items()
    }
    show(costs)
    write_json(costs, flags.output)


@torch.no_grad()
def prompt_and_generation_seconds(model: PreTrainedModel, flags: Flags) -> tuple[float, float]:
    """Return the seconds for the prompt and for the generated tokens: one sequence, greedy."""
    prompt = torch.arange(flags.prompt_tokens).remainder(model.config.vocab_size).unsqueeze(0)
    start = time.perf_counter()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    after_prompt = time.perf_counter()
    for _ in range(flags.new_tokens):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return after_prompt - start, time.perf_counter() - after_prompt


def active_parameters(model: PreTrainedModel) -> int:
    """Return the parameters that one token uses: of a layer's routed experts only the top-k."""
    config = model.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    return model.num_parameters() - routed + routed * chosen // experts


def show(costs: dict[str, dict[str, float]]) -> None:
    """Print a line for each model, with its speeds also as multiples of the first model's."""
    table = Table("model", "parameters", "active", "prompt tokens/s", "generated tokens/s")
    first = next(iter(costs.values()))
    for title, one in costs.items():
        speeds = [
            f"{one[name]:,.0f} ({one[name] / first[name]:.2f}x)"
            for name in ("prompt_tokens_per_second", "generated_tokens_per_second")
        ]
        table.add_row(title, *(f"{one[name]:,}" for name in ("parameters", "active_parameters")), *speeds)
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
