"""What exported models cost: parameters, parameters a token uses, and tokens/s of transformers, all models in turns.

python examples/demo/costs.py --hf "Base model=data/base_model" "MoE-LPR=runs/paper/hf/moe_lpr" --output costs.json
"""

import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.filesystem import atomic_file, check_output_file


@dataclasses.dataclass
class Flags:
    """What exported models cost."""

    hf: list[str]
    """TITLE=DIRECTORY of each Hugging Face model; the first is what the others are compared with."""
    output: Path
    """JSON file to write: for each title parameters, active_parameters, prompt_tokens_per_second and
    generated_tokens_per_second."""
    prompt_tokens: int = 256
    """Length of the prompt."""
    new_tokens: int = 64
    """Tokens to generate, one at a time."""
    rounds: int = 5
    """Each model's turns; the median counts."""


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
        models[title] = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    times = {title: ([], []) for title in models}
    # The first round only compiles kernels and fills caches.
    for turn in range(flags.rounds + 1):
        for title, model in models.items():
            for seconds, taken in zip(times[title], turn_of(model.eval(), flags), strict=True):
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
    with atomic_file(flags.output) as partial:
        partial.write_text(json.dumps(costs, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def turn_of(model: PreTrainedModel, flags: Flags) -> tuple[float, float]:
    """Seconds for the prompt and for the tokens after it, one sequence, greedy."""
    prompt = torch.arange(flags.prompt_tokens).remainder(model.config.vocab_size).unsqueeze(0)
    start = time.perf_counter()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    after_prompt = time.perf_counter()
    for _ in range(flags.new_tokens):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return after_prompt - start, time.perf_counter() - after_prompt


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that one token uses: of a layer's routed experts only as many as it chooses."""
    config = model.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    return model.num_parameters() - routed + routed * chosen // experts


def show(costs: dict[str, dict[str, float]]) -> None:
    """A line for each model, speeds also as a multiple of the first one's."""
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
