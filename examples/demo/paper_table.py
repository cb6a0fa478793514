"""The paper's Table 1 in small: other methods on the same samples, and ablations of MoE-LPR."""

from dataclasses import replace
from pathlib import Path

from method import DENSE_FULL, MOE_FULL, NO_LPR, STAGE1, STAGE2
from settings import read_settings
from workflow import Training, Workflow

REFERENCE_LPR = Training(
    "reference_lpr", "review with the first implementation's LPR", "2", "stage1", ("--lpr-loss-form", "reference")
)
BLOCKS = Training("blocks", "block expansion", "blocks", "more_blocks")

TABLE = (
    ("LoRA", "lora"),
    ("Full fine-tuning", DENSE_FULL),
    ("LLaMA-Pro: block expansion", BLOCKS),
    ("Mixture, nothing frozen", MOE_FULL),
    ("MoE-LPR", STAGE2),
    ("- without the review", STAGE1),
    ("- review without LPR", NO_LPR),
    ("- review, first implementation's LPR", REFERENCE_LPR),
)
"""Title and training of each row of the paper's Table 1 in small. LoRA is no stage: lora.py trains it."""
TABLE_TRAININGS = (STAGE1, STAGE2, NO_LPR, REFERENCE_LPR, MOE_FULL, DENSE_FULL, BLOCKS)
"""Order of the trainings: each comes after the one that it starts from."""


def paper_table() -> None:
    """Train the paper's Table 1 in small and print means over the seeds, which run at the same time."""
    flow = Workflow(read_settings(runs=Path("runs/paper"), ranks=1, replay_documents=4))
    settings, table = flow.settings, flow.settings.runs
    flow.demo_tokens()
    flow.dense()
    blocks = settings.inserted_blocks
    flow.checkpoint("more_blocks", f"dense model with {blocks} more blocks", "--expand-blocks", blocks)
    flow.evaluate("base")
    flow.beside({f"seed {seed}": lambda one, seed=seed: train_rows(one, int(seed), table) for seed in settings.seeds})

    first = table / f"seed-{settings.seeds[0]}"
    for name in ("stage2", "blocks", "dense_full"):
        flow.export(first / name, table / "hf" / name, f"{name} to Hugging Face")
    costs = table / "costs.json"
    models = {
        "Base model": settings.base,
        "LoRA": first / "lora_hf",
        "Full fine-tuning": table / "hf" / "dense_full",
        "LLaMA-Pro: block expansion": table / "hf" / "blocks",
        "MoE-LPR": table / "hf" / "stage2",
    }
    words = ("--output", costs, "--hf", *(f"{title}={hf}" for title, hf in models.items()))
    flow.step(costs, "parameters and speed of the exported models", lambda: flow.demo("costs", *words))

    evaluations: dict[str, Path | list[Path]] = {"Base model": flow.evaluation("base")}
    for title, training in TABLE:
        name = training if isinstance(training, str) else training.name
        evaluations[title] = [table / f"seed-{seed}" / "evaluation" / f"{name}.json" for seed in settings.seeds]
    curves = table / "scaling" / "curves.json"
    flow.report(
        table / "report.html",
        evaluations,
        *(("--curves", curves) if curves.exists() else ()),
        *("--subject", "MoE-LPR", "--costs", costs),
        *("--metrics", f"Stage 1={first}/stage1/metrics.jsonl", f"Stage 2={first}/stage2/metrics.jsonl"),
    )
    flow.say(f"report: {table / 'report.html'}")


def train_rows(flow: Workflow, seed: int, table: Path) -> None:
    """Run all trainings of one seed, then their evaluations."""
    flow = flow.change(seed=seed, data=flow.settings.datasets, runs=table / f"seed-{seed}")
    flow.mixture("--seed", seed)
    for training in TABLE_TRAININGS:
        same_for_all = training.load in ("base", "more_blocks")
        flow.train(replace(training, load=str(table / training.load)) if same_for_all else training)
    train_lora(flow)
    for _, training in TABLE:
        flow.evaluate(training if isinstance(training, str) else training.name)


def train_lora(flow: Workflow) -> None:
    """Train LoRA, then import its merged model like any dense one."""
    settings, hf = flow.settings, flow.settings.runs / "lora_hf"
    flags = (
        *("--hf", settings.base, "--save", hf, "--data-path", *flow.prefixes("train", settings.expanded)),
        *("--train-iters", settings.stage1_iters, "--global-batch-size", settings.stage1_batch),
        *("--seq-length", settings.length, "--lr", settings.lora_lr),
        *("--lr-warmup-iters", settings.stage1_iters // 20, "--seed", settings.seed, settings.precision),
    )
    flow.step(hf / "config.json", "LoRA", lambda: flow.demo("lora", *flags))
    flow.checkpoint("lora", "LoRA to Megatron", "--num-experts", 1, hf=hf)
