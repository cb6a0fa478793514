"""The target `vocabulary`: the demo with and without new tokens, at equal bytes of text.

Described in docs/vocabulary.md. With an extended tokenizer the same text is fewer tokens, and so fewer steps.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from settings import Settings, read_settings
from workflow import Training, Workflow

RUNS = Path("runs/demo-vocabulary")
TITLES = {"without": "old vocabulary", "with": "new tokens"}
FROZEN = "new tokens, their rows frozen in the review"


def vocabulary() -> None:
    """Train both arms, measure them, and print the comparison."""
    flow, arms = prepare()
    settings, tokenizer = flow.settings, arms["with"].settings.tokenizer
    arms["without"].dense()
    arms["without"].evaluate("base")
    trained = {name: train(arm, arms["without"]) for name, arm in arms.items()}
    trained["with"].train(Training("frozen", f"{FROZEN}: stage 2", "2", "stage1", ("--no-train-new-rows",)))
    trained["with"].evaluate("frozen")
    costs = settings.runs / "costs.json"
    exports = [f"{TITLES[name]}={arm.settings.runs / 'hf'}" for name, arm in trained.items()]
    flow.step(costs, "tokens a second when generating", lambda: flow.demo("costs", "--hf", *exports, "--output", costs))
    initial = ("--hf", settings.base, "--tokenizer", tokenizer, "--corpus", settings.corpus)
    initial = (*initial, "--original", *settings.original, "--expanded", *settings.expanded)
    flow.step(settings.runs / ".initial", "first rows of new tokens", lambda: flow.demo("initial_rows", *initial))
    report(flow, trained, json.loads(costs.read_text()))


def prepare() -> tuple[Workflow, dict[str, Workflow]]:
    """Make the tokenizer and the datasets. Returns the workflow, and those of both arms."""
    settings = read_settings(runs=RUNS)
    flow = Workflow(settings)
    tokenizer = settings.runs / "tokenizer"
    flow.step(tokenizer / "extension.json", "new tokens for the tokenizer", lambda: flow.tool(*extension(settings)))
    arms = {
        "without": flow.change(runs=settings.runs / "without"),
        "with": flow.change(runs=settings.runs / "with", tokenizer=tokenizer),
    }
    for arm in arms.values():
        arm.demo_tokens()
    return flow, arms


def extension(settings: Settings) -> tuple[object, ...]:
    """Return the command that extends the base model's tokenizer."""

    def texts(languages: Sequence[str]) -> list[str]:
        return [f"{name}={settings.corpus / 'train' / name}.jsonl.zst" for name in languages]

    flags = ("--hf", settings.base, "--new-tokens", settings.new_tokens, "--output", settings.runs / "tokenizer")
    return "extend_tokenizer", *flags, "--learn", *texts(settings.expanded), "--guard", *texts(settings.original)


def train(arm: Workflow, reference: Workflow) -> Workflow:
    """Train, evaluate and export an arm. Returns its workflow, with the numbers of steps that it took."""
    arm, settings = train_stage1(arm, reference), arm.settings
    arm.train(Training("stage2", f"{arm_title(arm)}: stage 2", "2", "stage1"))
    for name in ("stage1", "stage2"):
        arm.evaluate(name)
    arm.export(settings.runs / "stage2", settings.runs / "hf", f"{arm_title(arm)}: export")
    return arm


def train_stage1(arm: Workflow, reference: Workflow) -> Workflow:
    """Train stage 1 of an arm. Returns its workflow, with the numbers of steps for as many bytes as in `reference`."""
    old, settings = reference.settings, arm.settings
    steps = {"stage1_iters": old.stage1_iters * stage1_bytes(reference) / stage1_bytes(arm)}
    steps["stage2_iters"] = old.stage2_iters * review_bytes(reference) / review_bytes(arm)
    arm = arm.change(**{name: round(number) for name, number in steps.items()})
    arm.mixture(*(("--tokenizer", settings.tokenizer) if settings.tokenizer else ()))
    arm.train(Training("stage1", f"{arm_title(arm)}: stage 1", "1", "moe", share_experts=True))
    return arm


def arm_title(arm: Workflow) -> str:
    return TITLES["with" if arm.settings.tokenizer else "without"]


def stage1_bytes(arm: Workflow) -> float:
    """Bytes of text in a token of stage 1, which draws its datasets in proportion to their tokens."""
    return bytes_per_token(arm.prefixes("train", arm.settings.expanded))


def review_bytes(arm: Workflow) -> float:
    """Bytes of text in a token of the review, which draws each replay half as often as each new language."""
    settings = arm.settings
    weights = dict.fromkeys(arm.prefixes(settings.replay, settings.original), 1)
    weights |= dict.fromkeys(arm.prefixes("train", settings.expanded), 2)
    parts = [weight * bytes_per_token([prefix]) for prefix, weight in weights.items()]
    return sum(parts) / sum(weights.values())


def bytes_per_token(prefixes: Sequence[Path]) -> float:
    """Bytes of text in a token of datasets, all together."""
    manifests = [manifest(prefix) for prefix in prefixes]
    return sum(one["text_bytes"] for one in manifests) / sum(one["tokens"] for one in manifests)


def manifest(prefix: Path) -> dict:
    return json.loads(Path(f"{prefix}.json").read_text())


def training_seconds(metrics: Path, tokens_per_step: int) -> float:
    """Seconds that the steps of a run took, without saves and evaluations, from its metrics."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds, before = 0.0, 0
    for line in lines:
        if line["kind"] == "train":
            seconds += (line["iteration"] - before) * tokens_per_step / line["tokens_per_second"]
            before = line["iteration"]
    return seconds


def row(arm: Workflow, costs: Mapping[str, float]) -> dict[str, float]:
    """What is compared of an arm."""
    settings = arm.settings
    step = settings.stage1_batch * settings.length
    width = bytes_per_token(arm.prefixes("valid", settings.expanded))
    return {
        "stage1_tokens": settings.stage1_iters * step,
        "stage1_seconds": training_seconds(settings.runs / "stage1" / "metrics.jsonl", step),
        "bytes_per_token": width,
        **quality(arm.evaluation("stage2")),
        "generated_bytes_per_second": width * costs["generated_tokens_per_second"],
        "parameters": costs["parameters"],
    }


def quality(evaluation: Path) -> dict[str, float]:
    """Bits per byte of both language groups and, with new tokens, the probability that these take."""
    averages = json.loads(evaluation.read_text())["averages"]
    names = [(group, name) for name in ("bits_per_byte", "new_token_mass") for group in ("original", "expanded")]
    return {f"{group}_{name}": averages[group][name] for group, name in names if averages[group].get(name) is not None}


def report(flow: Workflow, arms: Mapping[str, Workflow], costs: Mapping[str, Mapping[str, float]]) -> None:
    """Print the comparison, write it to vocabulary.json, and write the report."""
    rows = {TITLES[name]: row(arm, costs[TITLES[name]]) for name, arm in arms.items()}
    rows[FROZEN] = quality(arms["with"].evaluation("frozen"))
    (flow.settings.runs / "vocabulary.json").write_text(json.dumps(rows, indent=2) + "\n")
    table = Table("", *rows, title="equal bytes of text; bits per byte after the review")
    for name in rows[TITLES["with"]]:
        table.add_row(name.replace("_", " "), *(f"{one[name]:,.4g}" if name in one else "" for one in rows.values()))
    Console().print(table)
    evaluations: dict[str, Path | list[Path]] = {"Base model": arms["without"].evaluation("base")}
    for name, arm in arms.items():
        evaluations |= {f"{TITLES[name]}, stage {stage}": arm.evaluation(f"stage{stage}") for stage in (1, 2)}
    evaluations[FROZEN] = arms["with"].evaluation("frozen")
    flow.report(flow.settings.runs / "report.html", evaluations)
