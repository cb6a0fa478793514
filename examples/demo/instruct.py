"""The target `instruct`: from a model that continues text to one that answers, in old and new languages, in three ways.

Described in docs/instruct.md. The demo's mixture is grafted with an instruct model of its base, fine-tuned on
conversations (stage sft), or both; beside it the dense model is fine-tuned alone.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from method import finished_demo
from workflow import LATEST, Workflow

TEMPLATE = Path("examples/demo/chat_template.jinja")
ANSWERS, ENDED = "bits_per_byte", "ended"


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A run on conversations."""

    name: str
    """Name of its directory below RUNS."""
    title: str
    stage: str
    load: Path
    """Checkpoint that it starts from."""
    learned: Sequence[str]
    """Languages of its conversations."""
    replayed: Sequence[str] = ()
    """Original languages, each drawn half as often."""


def instruct() -> None:
    """Make an instruct model of the base model, and take the demo's mixture the three ways; measure all of them."""
    demo = finished_demo()
    runs = demo.settings.runs.with_name(f"{demo.settings.runs.name}-instruct")
    # The demo's datasets serve the evaluation of what is forgotten.
    flow = demo.change(runs=runs, data=demo.settings.datasets)
    original, expanded = flow.settings.original, flow.settings.expanded
    base, stage2 = runs / "base_hf", demo.settings.runs / "stage2"
    conversations(flow, base)
    flow.checkpoint("base", "the base model with a chat template to Megatron", "--num-experts", 1, hf=base)
    dense = FineTuning(
        "dense", "an instruct model: the dense model on original languages", "full", runs / "base", original
    )
    fine_tune(flow, dense)
    flow.export(runs / "dense", runs / "hf" / "dense", "export of the instruct model")
    graft(flow, stage2, base)
    for run in (
        FineTuning("dense_new", "the instruct model on new languages alone", "full", runs / "dense", expanded),
        FineTuning("sft", "stage sft after the review", "sft", stage2, expanded, original),
        FineTuning("graft_sft", "stage sft after the graft", "sft", runs / "graft", expanded, original),
    ):
        fine_tune(flow, run)
    measure(flow, demo)
    report(flow, demo)


def conversations(flow: Workflow, base: Path) -> None:
    """Write the conversations, the base model with their chat template, and the datasets of all languages."""
    settings, runs = flow.settings, flow.settings.runs
    for split in ("train", "valid"):
        words = ("--corpus", settings.corpus / split, "--languages", *settings.languages, "--output", runs / split)
        flow.step(
            runs / split / f"{settings.languages[-1]}.jsonl",
            f"conversations ({split})",
            lambda words=words: flow.demo("conversations", *words),
        )

    def with_template() -> None:
        shutil.copytree(settings.base, base, dirs_exist_ok=True)
        shutil.copy(TEMPLATE, base)

    flow.step(base / ".done", "the base model with a chat template", with_template)
    for language in settings.languages:
        words = ("--chat", "--input", runs / "train" / f"{language}.jsonl", "--tokenizer", base)
        words = (*words, "--language", language, "--output-prefix", chat(runs, language))
        flow.step(
            Path(f"{chat(runs, language)}.json"),
            f"tokens of conversations {language}",
            lambda words=words: flow.tool("preprocess_data", *words),
        )


def chat(runs: Path, language: str) -> Path:
    """Prefix of the conversations' dataset."""
    return runs / "data" / f"chat-{language}"


def fine_tune(flow: Workflow, run: FineTuning) -> None:
    """Train on conversations; an interrupted run resumes."""
    settings, save = flow.settings, flow.settings.runs / run.name
    iters = settings.sft_iters if run.name != "dense" else settings.instruct_iters
    weighted = {**dict.fromkeys(run.learned, 2), **dict.fromkeys(run.replayed, 1)}
    blend = [word for language, weight in weighted.items() for word in (weight, chat(settings.runs, language))]
    flags = (
        *("--stage", run.stage, "--load", run.load, "--save", save, settings.precision, "--train-iters", iters),
        *("--micro-batch-size", settings.stage1_batch // settings.ranks, "--global-batch-size", settings.stage1_batch),
        *("--seq-length", settings.length, "--original-languages", *settings.original, "--num-workers", 0),
        *("--lr", settings.instruct_lr, "--lr-warmup-iters", max(1, iters * 3 // 100), "--lr-decay-style", "linear"),
        *("--log-interval", 20, "--save-interval", 100, "--seed", settings.seed, "--data-path", *blend),
        *(("--expert-model-parallel-size", settings.ranks) if run.stage == "sft" else ()),
    )
    flow.step(save / ".done", run.title, lambda: flow.on_ranks("-m", "megatron_moe_lpr.pretrain", *flags))


def graft(flow: Workflow, load: Path, base: Path) -> None:
    """Graft the instruct model onto the mixture."""
    runs = flow.settings.runs
    words = ("graft", "--load", load, "--base", base, "--instruct", runs / "hf" / "dense", "--save", runs / "graft")
    flow.step(runs / "graft" / LATEST, "graft", lambda: flow.tool("convert_hf", *words))


def models(flow: Workflow, demo: Workflow) -> dict[str, tuple[str, Path]]:
    """Name and checkpoint of each compared model, by its title."""
    runs = flow.settings.runs
    return {
        "base model": ("base", runs / "base"),
        "dense, SFT on original languages: the instruct model": ("dense", runs / "dense"),
        "dense, SFT on new languages after it": ("dense_new", runs / "dense_new"),
        "MoE-LPR": ("stage2", demo.settings.runs / "stage2"),
        "MoE-LPR, grafted": ("graft", runs / "graft"),
        "MoE-LPR, stage sft": ("sft", runs / "sft"),
        "MoE-LPR, grafted, stage sft": ("graft_sft", runs / "graft_sft"),
    }


def measure(flow: Workflow, demo: Workflow) -> None:
    """Measure answers of all models, and what they know of the demo's validation text."""
    runs, languages = flow.settings.runs, flow.settings.languages
    for title, (name, checkpoint) in models(flow, demo).items():
        hf, output = runs / "hf" / name, runs / "answers" / f"{name}.json"
        flow.export(checkpoint, hf, f"export: {title}")
        words = ("--hf", hf, "--conversations", runs / "valid", "--languages", *languages)
        words = (*words, "--chat-template", TEMPLATE, "--output", output)
        output.parent.mkdir(parents=True, exist_ok=True)
        flow.step(output, f"answers: {title}", lambda words=words: flow.demo("answers", *words))
        flow.evaluate(name, checkpoint)


def report(flow: Workflow, demo: Workflow) -> None:
    """Print the table, as Markdown, and write its figures to instruct.json."""
    settings, found = flow.settings, {}
    for title, (name, _) in models(flow, demo).items():
        answers = json.loads((settings.runs / "answers" / f"{name}.json").read_text())
        text = json.loads(flow.evaluation(name).read_text())["averages"]
        found[title] = {
            f"{key} {group}": sum(answers[language][key] for language in languages) / len(languages)
            for key in (ENDED, ANSWERS)
            for group, languages in (("original", settings.original), ("expanded", settings.expanded))
        } | {f"text {group}": text[group]["bits_per_byte"] for group in ("original", "expanded")}
    (settings.runs / "instruct.json").write_text(json.dumps(found, indent=2) + "\n")
    flow.say("\n".join(table(found)))


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """Lines of a Markdown table: shares in per cent, bits per byte with three digits."""
    columns = [
        "| | answers that end: original | expanded | bits per byte of answers: original | expanded | of text: original "
        "| expanded |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines = []
    for title, values in found.items():
        cells = [f"{value:.0%}" if name.startswith(ENDED) else f"{value:.3f}" for name, value in values.items()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return columns + lines
