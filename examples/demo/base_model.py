"""Makes data/base_model, the dense model that the demo starts from."""

import shutil
from pathlib import Path

from settings import read_settings
from workflow import Workflow


def base_model() -> None:
    """Make data/base_model again: a tokenizer, random weights, then full training on en, es and zh.

    1% of each of el, hu and tr is mixed in, because a real model has seen some text of every language.
    """
    flow = Workflow(read_settings(runs=Path("runs/base_model")))
    settings, runs = flow.settings, flow.settings.runs
    random = runs / "random_hf"
    flags = ("--input", f"{settings.corpus}/train/*.jsonl.zst", "--hf", random)
    flow.step(random / "config.json", "tokenizer and random weights", lambda: flow.demo("random_model", *flags))
    for language in settings.languages:
        flow.tokens("train", "train", language, tokenizer=random)
        flow.tokens("valid", "valid", language, tokenizer=random)
    flow.checkpoint("random", "to Megatron", "--num-experts", 1, hf=random)
    weights = dict(zip(settings.languages, (38.8, 34.92, 23.28, 1, 1, 1), strict=True))
    data = [word for language, weight in weights.items() for word in (weight, *flow.prefixes("train", [language]))]
    train = (
        *("-m", "megatron_moe_lpr.pretrain", "--stage", "full", "--load", runs / "random", "--save", runs / "trained"),
        *(settings.precision, "--train-iters", settings.iters, "--micro-batch-size", 8 // settings.ranks),
        *("--global-batch-size", 8, "--seq-length", 256, "--lr", "2e-3", "--min-lr", "1e-4"),
        *("--lr-warmup-iters", 100, "--weight-decay", "0.1", "--adam-beta2", "0.95", "--data-path", *data),
        *("--valid-data-path", *flow.prefixes("valid", settings.languages)),
        *("--original-languages", *settings.original, "--num-workers", 0, "--log-interval", 50, "--save-interval", 500),
    )
    flow.step(runs / "trained" / ".done", "training", lambda: flow.on_ranks(*train))
    flow.export(runs / "trained", runs / "hf", "to Hugging Face")
    shutil.copy(runs / "trained" / "metrics.jsonl", runs / "hf" / "metrics.jsonl")
    flow.say(f"the base model is in {runs / 'hf'}; cp -r it to data/base_model to use it in the demo")
