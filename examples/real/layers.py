"""Which layers get experts: an allocation by the base model's own states, and the speed of the candidates in training.

`settings.layout` is the choice; this writes down what it rests on, in RUNS/allocation.json and RUNS/trial.json.
"""

import shutil
from pathlib import Path

from examples.real.base import BASE
from examples.real.flow import METRICS, Flow, tokens_per_second
from examples.real.mixture import upcycle
from examples.real.settings import Layout
from examples.real.text import make_sample, prefix
from examples.real.tokenizer import NEW, OLD
from megatron_moe_lpr.files.json_files import read_json, write_json


def compare_layers(flow: Flow) -> None:
    """Write the allocation, then tokens a second of each layout, with and without new tokens.

    With new tokens the backward pass goes down to the embedding, whose new rows train, so that experts in the upper
    layers alone save nothing; without them it ends at the lowest expert.
    """
    settings, output = flow.settings, flow.runs / "allocation.json"
    data = [prefix(flow, OLD, language) for language in settings.expanded] + make_sample(flow, settings.hf(BASE))
    layers = read_json(settings.hf(BASE) / "config.json")["num_hidden_layers"]
    layout = settings.layouts[settings.layout]
    budget = sum(map(int, layout.frequency(layers)[1:-1].split(","))) * (layout.num_experts - 1)
    words = (
        *("allocate", "--hf", settings.hf(BASE), "--original-languages", *settings.original, "--data-path", *data),
        *(
            "--uniform-count",
            layout.num_experts,
            "--budget",
            budget,
            "--tokens-per-language",
            settings.allocation_tokens,
        ),
        *("--output", output, "--plot", output.with_suffix(".svg")),
    )
    flow.step(output, "layers: allocation", lambda: flow.moe_lpr(*words))
    trial = flow.runs / "trial.json"
    flow.step(trial, "layers: trial", lambda: write_json(speeds(flow), trial))


def speeds(flow: Flow) -> dict[str, dict[str, float | None]]:
    """Train each layout for a few steps. Returns tokens a second, by layout and by tokens."""
    return {
        name: {tokens: speed(flow, layout, tokens, f"trial of {name}, {tokens} tokens") for tokens in (OLD, NEW)}
        for name, layout in flow.settings.layouts.items()
    }


def speed(flow: Flow, layout: Layout, tokens: str, title: str) -> float | None:
    """Return tokens a second of some steps of stage 1, without the first. The checkpoints are removed."""
    settings, place = flow.settings, flow.runs / "trial"
    shutil.rmtree(place, ignore_errors=True)
    trial = Untimed(settings)
    upcycle(trial, tokens, layout, place / "start", title)
    data = [prefix(flow, tokens, language) for language in settings.expanded]
    flags = {**settings.stage1, "log_interval": 1, "lr_warmup_iters": 0}
    run = trial.train("trial/run", title, "1", place / "start", data, settings.trial_iters, flags)
    found = tokens_per_second(run / METRICS, skip=1)
    shutil.rmtree(place)
    return found


class Untimed(Flow):
    """A flow whose steps are parts of a step, and not recorded by themselves."""

    def _record(self, title: str, seconds: float, peak_bytes: int, done: Path) -> None:
        pass
