"""The target `mixture`: a base model that is a mixture itself gets experts for new languages."""

import shutil
from dataclasses import replace
from pathlib import Path

from settings import read_settings
from workflow import Training, Workflow

BASE_EXPERTS = 8
BASE_ITERS = 200
"""Steps that train the mixture base, every parameter, on the original languages."""
ADDED = 4
"""New experts in every layer: a stock mixture holds one number of experts for all of them."""
STAGE1 = Training("stage1", "stage 1: new experts learn the expanded languages", "1", "start")
STAGE2 = Training("stage2", "stage 2: review the original languages", "2", "stage1")
TRAINED_ROWS = ("--train-base-router",)


def mixture() -> None:
    """Train a mixture of the demo's dense model, then extend it by new experts. Described in docs/mixture.md."""
    flow = Workflow(read_settings(runs=Path("runs/demo-mixture"), stage1_iters=100, stage2_iters=300))
    settings, runs = flow.settings, flow.settings.runs
    flow.demo_tokens()
    for language in settings.original:
        flow.tokens("train", "train", language)
    base = mixture_base(flow)
    sample = ("--sample", *flow.prefixes("train", settings.expanded))
    flow.checkpoint("start", "four new experts", "--add-experts", ADDED, *sample, hf=base)
    flow.checkpoint("random", "four new experts, of random ones", "--add-experts", ADDED, hf=base)
    flow.evaluate("start")
    both_stages(flow, "")
    both_stages(flow, "random", load="random")
    both_stages(flow, "rows", flags=TRAINED_ROWS)
    flow.export(runs / "stage2", runs / "hf", "export to Hugging Face")
    compared = ("verify", "--load", runs / "stage2", "--hf", runs / "hf", "--tolerance", "1e-3")
    flow.step(runs / ".verified", "the export computes what Megatron does", lambda: flow.tool("convert_hf", *compared))
    titles = {"": "New experts are those used most", "random": "Random ones", "rows": "Base router rows train too"}
    found = {"Mixture base": flow.evaluation("start")}
    for name, title in titles.items():
        for stage in (1, 2):
            found[f"{title}, stage {stage}"] = flow.evaluation(_named(f"stage{stage}", name))
    flow.report(runs / "report.html", found)


def mixture_base(flow: Workflow) -> Path:
    """Return a Hugging Face directory with a Qwen2-MoE, all of whose parameters were trained on the base model's text.

    The demo's dense model is upcycled and trained whole (`--stage full`); without this project's files its export is a
    mixture like any other.
    """
    settings, hf = flow.settings, flow.settings.runs / "base_hf"
    flow.checkpoint("upcycled", f"dense model to {BASE_EXPERTS} experts", "--num-experts", BASE_EXPERTS)
    weights = dict(zip(settings.languages, (38.8, 34.92, 23.28, 1, 1, 1), strict=True))
    data = [word for language, weight in weights.items() for word in (weight, *flow.prefixes("train", [language]))]
    train = (
        *("-m", "megatron_moe_lpr.pretrain", "--stage", "full", "--load", settings.runs / "upcycled"),
        *("--save", settings.runs / "base", settings.precision, "--train-iters", BASE_ITERS),
        *("--micro-batch-size", 8 // settings.ranks, "--global-batch-size", 8, "--seq-length", settings.length),
        *("--lr", "1e-3", "--min-lr", "1e-4", "--lr-warmup-iters", 20, "--data-path", *data),
        *("--original-languages", *settings.original, "--num-workers", 0, "--log-interval", 20),
    )
    flow.step(settings.runs / "base" / ".done", "the mixture base is trained", lambda: flow.on_ranks(*train))
    flow.export(settings.runs / "base", hf, "the mixture base to Hugging Face")
    shutil.rmtree(hf / "moe_lpr", ignore_errors=True)
    return hf


def both_stages(flow: Workflow, name: str, load: str = "start", flags: tuple[str, ...] = ()) -> None:
    """Train both stages and evaluate after each; `name` names the variant in directories and tables."""
    first, second = _named("stage1", name), _named("stage2", name)
    flow.train(replace(STAGE1, name=first, load=load, flags=flags))
    flow.train(replace(STAGE2, name=second, load=first, flags=flags))
    flow.evaluate(first)
    flow.evaluate(second)


def _named(stage: str, name: str) -> str:
    return f"{stage}-{name}" if name else stage
