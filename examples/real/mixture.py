"""An extended model: a mixture upcycled from the base model, stage 1, the review, the export."""

from dataclasses import dataclass
from pathlib import Path

from workflow import LATEST

from examples.real.base import BASE
from examples.real.flow import Flow
from examples.real.settings import Layout
from examples.real.text import prefix, steps_of_one_pass
from examples.real.tokenizer import NEW, OLD, directory
from megatron_moe_lpr.files.json_files import read_json


@dataclass(frozen=True)
class Extension:
    """One of the two extended models."""

    title: str
    """Name in tables."""
    name: str
    """Name of its directories."""
    tokens: str
    """OLD or NEW: which datasets it reads, and whether it has new tokens."""


EXTENDED = Extension("MoE-LPR", "moe-lpr", NEW)
OLD_TOKENS = Extension("MoE-LPR, base's tokens", "moe-lpr-old-tokens", OLD)


def extend(flow: Flow, model: Extension) -> Path:
    """Make an extended model. Returns its Hugging Face directory."""
    settings, place = flow.settings, flow.runs / model.name
    layout = settings.layouts[settings.layout]
    start = place / "start"
    upcycle(flow, model.tokens, layout, start, model.title)
    flow.verify(start, settings.hf(BASE), f"{model.title}: comparison of the upcycled model with the base model")
    learned = [prefix(flow, model.tokens, language) for language in settings.expanded]
    iters = steps_of_one_pass(flow, model.tokens, settings.expanded)
    stage1 = flow.train(f"{model.name}/stage1", f"{model.title}: stage 1", "1", start, learned, iters, settings.stage1)
    return flow.export(review(flow, model, stage1), model.name, model.title)


def review(flow: Flow, model: Extension, stage1: Path) -> Path:
    """Run stage 2. Returns its checkpoint."""
    settings, weights = flow.settings, flow.settings.review_weights
    blend: list[object] = []
    for group, languages in (("original", settings.original), ("expanded", settings.expanded)):
        for language in languages:
            blend += [weights[group], prefix(flow, model.tokens, language)]
    flags = {name: value for name, value in settings.stage2.items() if name != "train_iters"}
    iters = settings.stage2["train_iters"]
    return flow.train(f"{model.name}/stage2", f"{model.title}: review", "2", stage1, blend, iters, flags)


def upcycle(flow: Flow, tokens: str, layout: Layout, save: Path, title: str) -> None:
    """Import the base model as a mixture, with rows for the new tokens if it has them."""
    hf = flow.settings.hf(BASE)
    layers = read_json(hf / "config.json")["num_hidden_layers"]
    experts = ("--num-experts", layout.num_experts, "--moe-layer-freq", layout.frequency(layers))
    rows = ("--tokenizer", directory(flow)) if tokens == NEW else ()
    words = ("import", "--hf", hf, "--save", save, *experts, *rows)
    flow.step(save / LATEST, f"{title}: import", lambda: flow.moe_lpr(*words))
